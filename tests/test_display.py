"""What people see of training: figures from a journal, a panel at any width, and real terminals as they end up."""

import io
import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyte
import pytest
from rich.console import Console
from rich.text import Text
from test_train import RECIPE, TRAIN

from fcn_dist.errors import EXIT_REQUEUE
from fcn_dist.training.librarylogs import kept_in
from fcn_dist.training.panel import age, panel, spark, summary
from fcn_dist.training.runfolder import Journal
from fcn_dist.training.standing import Standing

ROOT = Path(__file__).parents[1]
ROWS, COLUMNS = 60, 100
TIME_LIMIT = 150.0


def trained(step: int, loss: float | None, **others: Any) -> dict[str, Any]:
    figures = {
        "epoch": step / 10,
        "learning_rate": 1e-3,
        "gradient_norm": 2.5,
        "loss_scale": 65536.0,
        "images_per_second": 24.0,
        "data_wait": 0.01,
        "mfu": 0.41,
        "peak_memory": 2_500_000_000,
        "skipped_steps": 0,
    }
    return {"event": "train", "step": step, "time": 0.0, "loss": loss, **figures, **others}


def evaluated(step: int, mean_iou: float) -> dict[str, Any]:
    return {"event": "evaluate", "step": step, "time": 0.0, "official": {"mean_iou": mean_iou}}


def a_standing() -> Standing:
    standing = Standing(steps=100, world_size=4)
    for line in (
        trained(10, 3.0),
        evaluated(10, 0.5),
        trained(20, None),
        trained(30, 1.0, skipped_steps=2),
        evaluated(30, 0.25),
        {"event": "checkpoint", "step": 30, "time": time.time() - 150},
        {"event": "straggler", "step": 30, "time": 0.0, "rank": 3, "host": "node2", "reason": "data"},
        {"event": "bad_sample", "step": 30, "time": 0.0},
    ):
        standing.hear(line)
    return standing


def shown(what: Any, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(what)
    return console.export_text().splitlines()


def test_the_loss_is_smoothed_from_its_first_figure_on() -> None:
    standing = a_standing()
    assert standing.losses == pytest.approx([3.0, (0.9 * 3.0 + 1.0) / 1.9])  # weights 0.09 and 0.1


def test_the_best_evaluation_is_remembered_beside_the_last() -> None:
    standing = a_standing()
    assert standing.last_score == (30, 0.25) and standing.best_score == (10, 0.5)


def test_a_spark_line_goes_from_its_lowest_bar_to_its_highest_and_grows_no_longer() -> None:
    assert spark([1.0, 2.0, 3.0]) == "▁▅█" and spark([2.0, 2.0]) == "▁▁"
    assert spark([float(i // 10) for i in range(240)])[0] == "▁" and len(spark([0.0] * 1000)) == 24


def test_ages_are_told_in_units_a_person_would_take() -> None:
    assert [age(s) for s in (0.4, 59, 60, 3599, 7800)] == ["0 s", "59 s", "1 min", "59 min", "2 h 10 min"]


@pytest.mark.parametrize("width", [30, 50, 77, 78, 120, 200])
def test_a_panel_has_every_figure_at_any_width_and_keeps_to_it(width: int) -> None:
    lines = shown(panel(a_standing(), "fcn8s on [vgg16]", Text("bar"), width), width)
    assert {len(line) for line in lines} == {min(width, 100)}
    text = re.sub(r"[│\s]+", " ", " ".join(lines))
    values = ["1.9474", "1.00e-03", "2.5", "65,536", "24.0 images/s", "1 % for data", "2.5 GB", "41 %", "25.00 %"]
    for value in (
        *values,
        "50.00 %",
        "step 30, 2 min ago",
        "rank 3 on node2 waits for",
        "1 damaged sample and 2 steps",
    ):
        assert value in text, (value, text)
    assert any("epoch" in line and "speed" in line for line in lines) == (width >= 78)


def test_before_the_first_figures_a_panel_says_so_and_a_summary_tells_of_this_start() -> None:
    assert any("no step is logged yet" in line for line in shown(panel(Standing(9, 1), "", Text(), 80), 80))
    standing = Standing(steps=100, world_size=1, first_step=20)
    standing.hear(trained(30, 1.0))
    assert any("10 steps in 0 s, to step 30 of 100" in line for line in shown(summary(standing), 80))


def test_a_continued_journal_is_told_again_up_to_where_the_run_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    for step, score in ((2, 0.3), (4, 0.9)):
        journal.write("evaluate", step, official={"mean_iou": score})
    standing = Standing(9, 1)
    continued = Journal(tmp_path, 2, [standing.hear])
    assert standing.best_score == (2, 0.3)
    continued.write("evaluate", 4, official={"mean_iou": 0.4})
    assert standing.best_score == (4, 0.4)
    assert [json.loads(line)["step"] for line in continued.path.read_text().splitlines()] == [2, 4]


def test_library_logs_and_warnings_go_to_a_file_errors_to_the_screen_too_and_all_is_as_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ranks" / "rank-00000.log"
    logger = logging.getLogger("a library of the tests")
    own = logging.StreamHandler(sys.stdout)
    logger.addHandler(own)
    logger.propagate = False
    with kept_in(path):
        assert not path.parent.exists(), "nothing to keep yet"
        logger.warning("a word of caution")
        logger.error("a failure")
        logging.getLogger("one without handlers").warning("another word")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("a deprecation", FutureWarning, stacklevel=1)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("a failure") == 1 and "caution" not in captured.err
    kept = path.read_text()
    for words in ("a word of caution", "a failure", "another word", "a deprecation"):
        assert kept.count(words) == 1 + (words == "a deprecation"), words  # Python adds the line of code
    assert logger.handlers == [own]
    logger.warning("after")
    assert "after" in capsys.readouterr().out and "after" not in path.read_text()


# ---- real terminals


class Terminal:
    """A process in a pseudo-terminal, and the screen that a person would see."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        self.screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._own, theirs = pty.openpty()
        known = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
        known["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=known | (environment or {}), start_new_session=True
        )
        os.close(theirs)

    def read_until(self, done: Callable[[str], bool]) -> str:
        """The text on the screen once it is as wanted."""
        deadline = time.monotonic() + TIME_LIMIT
        while not done(self.text()):
            assert time.monotonic() < deadline and self._read(), self.text()
        return self.text()

    def end(self) -> tuple[int, str]:
        """Exit code, and what is left on the screen."""
        while self._read():
            pass
        return self.process.wait(TIME_LIMIT), self.text()

    def _read(self) -> bool:
        """Take in what comes next; False once everybody has closed the terminal."""
        assert select.select([self._own], [], [], TIME_LIMIT)[0], self.text()
        try:
            data = os.read(self._own, 65536)
        except OSError:  # as Linux says that nobody writes to it any more
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)

    def text(self) -> str:
        """Without what has scrolled away."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()


DISPLAY = """
    import logging, os, signal, sys
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    from fcn_dist.training.display import TrainingDisplay
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger("library").addHandler(handler)
    from fcn_dist.training.librarylogs import kept_in
    from pathlib import Path
    with kept_in(Path(sys.argv[1])), TrainingDisplay(9, 0, 1, "a [headline]\\nand more") as display:
        display.hear({line})
        display.step(5)
        display.say("news")
        logging.getLogger("library").warning("noise")
        logging.getLogger("library").error("trouble")
        print("printed by somebody")
        panelled = sys.stdout
        if os.fork() == 0:
            os._exit(int(sys.stdout is panelled or sys.stdout is not sys.__stdout__))
        assert os.wait()[1] == 0, "a child prints past the panel"
        {then}
"""


def display(tmp_path: Path, then: str, environment: dict[str, str] | None = None) -> Terminal:
    script = textwrap.dedent(DISPLAY).format(line=trained(5, 1.5), then=then)
    return Terminal([sys.executable, "-c", script, str(tmp_path / "log")], environment)


def test_in_a_terminal_the_panel_stays_one_and_ends_as_a_table(tmp_path: Path) -> None:
    terminal = display(tmp_path, "signal.sigwait([signal.SIGUSR1])")
    text = terminal.read_until(lambda text: "╰" in text and "printed by" in text and "5/9" in text)
    assert text.count("╭") == 1, text
    terminal.process.send_signal(signal.SIGUSR1)
    code, text = terminal.end()
    assert code == 0 and "╭" not in text and "summary" in text and "5 steps in" in text
    for words in ("a [headline]", "and more", "news", "printed by somebody", "trouble"):
        assert text.count(words) == 1, text
    assert "noise" not in text and "noise" in (tmp_path / "log").read_text()


def test_an_error_is_told_after_the_panel_is_gone(tmp_path: Path) -> None:
    code, text = display(tmp_path, "raise ValueError('broken')").end()
    assert code == 1 and "╭" not in text and text.index("summary") < text.index("ValueError: broken")


def test_without_colour_there_is_none(tmp_path: Path) -> None:
    colours = re.compile(rb"\x1b\[[0-9;]*3[0-9][0-9;]*m")
    seen = []
    for environment in ({"NO_COLOR": ""}, {"NO_COLOR": "1"}):
        terminal = display(tmp_path, "pass", environment)
        assert terminal.end()[0] == 0
        seen.append(bool(colours.search(terminal.raw)))
    assert seen == [True, False]


@pytest.mark.slow
def test_a_training_that_is_asked_to_stop_leaves_table_and_reason_on_the_screen(shards: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    command = [sys.executable, str(TRAIN), "--shards", str(shards), "--output", str(tmp_path / "run")]
    command += ["--recipe", str(recipe), "--steps", "5000", "--set", "log.every=1"]
    terminal = Terminal(command)
    terminal.read_until(lambda text: "╰" in text and "images/s" in text)
    terminal.process.send_signal(signal.SIGTERM)
    code, text = terminal.end()
    assert code == EXIT_REQUEUE, text
    assert "╭" not in text and text.index("summary") < text.index("stopped after step"), text
    assert re.search(r"saved +│ step \d+, \d s ago", text), text
