"""What people see of training: figures from a journal, a panel at any width, and real terminals as they end up."""

import fcntl
import io
import json
import logging
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
import warnings
from collections.abc import Callable
from functools import partial
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
    standing.step = 30
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


def test_lines_that_a_crash_has_damaged_do_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    for step in (1, 2, 3):
        journal.write("train", step, loss=1.0)
    first, second, third = journal.path.read_bytes().splitlines(keepends=True)
    damages = [b"\0" * 40 + second, b"\xff\xfe\r{}\n", b"[2]\n", b'{"event": "train", "step": null, "time": 1}\n']
    journal.path.write_bytes(b"".join([first, *damages, third, third[:-5]]))
    heard: list[int] = []
    assert Journal(tmp_path, 3, [lambda line: heard.append(line["step"])]).left_out == 4
    assert heard == [1, 3] and journal.path.read_bytes() == first + third


def test_steps_that_are_skipped_count_before_the_next_figures_do() -> None:
    standing = a_standing()
    for step in (31, 32):
        standing.hear({"event": "not_finite", "step": step, "time": 0.0})
    assert standing.skipped() == "1 damaged sample and 4 steps"
    standing.hear(trained(40, 1.0, skipped_steps=4))
    assert standing.skipped() == "1 damaged sample and 4 steps"


def test_a_loss_that_is_not_finite_is_not_shown_as_the_one_before() -> None:
    standing = a_standing()
    standing.hear(trained(40, None))
    assert any("not finite; before, 1.9474 smoothed" in line for line in shown(summary(standing), 100))


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

    def __init__(self, command: list[str], environment: dict[str, str] | None = None, rows: int = ROWS) -> None:
        self._own, theirs = pty.openpty()
        self.raw = b""
        self._show_as(COLUMNS, rows)
        known = {**os.environ, "TERM": "xterm-256color"}
        for name in ("COLUMNS", "LINES"):
            known.pop(name, None)
        known["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=known | (environment or {}), start_new_session=True
        )
        os.close(theirs)

    def _show_as(self, columns: int, rows: int) -> None:
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        fcntl.ioctl(self._own, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def narrow(self, columns: int) -> None:
        """As most terminals do it: what is on the screen is broken into more lines."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)
        while select.select([self._own], [], [], 0)[0]:
            self._read()
        lines = self.screen.display[: self.screen.cursor.y + 1]
        self._show_as(columns, self.screen.lines)
        self._stream.feed("\r\n".join(line.rstrip() for line in lines).encode())
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Its window is closed: nobody reads any more."""
        os.close(self._own)

    def read_until(self, done: Callable[[str], object]) -> str:
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
        if os.fork() == 0:
            os._exit(int(sys.stdout is not sys.__stdout__))
        assert os.wait()[1] == 0, "a child prints past the panel"
        {then}
"""


WAIT = "signal.sigwait([signal.SIGUSR1])"


def display(tmp_path: Path, then: str = WAIT, environment: dict[str, str] | None = None, rows: int = ROWS) -> Terminal:
    script = textwrap.dedent(DISPLAY).format(line=trained(5, 1.5), then=then)
    return Terminal([sys.executable, "-c", script, str(tmp_path / "log")], environment, rows)


def test_in_a_terminal_the_panel_stays_one_and_ends_as_a_table(tmp_path: Path) -> None:
    terminal = display(tmp_path)
    text = terminal.read_until(lambda text: "╰" in text and "printed by" in text and "5/9" in text)
    assert text.count("╭") == 1, text
    terminal.process.send_signal(signal.SIGUSR1)
    code, text = terminal.end()
    assert code == 0 and "╭" not in text and "summary" in text and "5 steps in" in text
    for words in ("a [headline]", "and more", "news", "printed by somebody", "trouble"):
        assert text.count(words) == 1, text
    assert "noise" not in text and "noise" in (tmp_path / "log").read_text()


def test_nothing_of_the_panel_is_left_when_the_window_becomes_narrower(tmp_path: Path) -> None:
    terminal = display(tmp_path)
    terminal.read_until(lambda text: "╰" in text and "printed by" in text and "5/9" in text)
    for columns in (60, 40):
        terminal.narrow(columns)
        last_line = f"╰{'─' * (columns - 5)}╯"
        text = terminal.read_until(partial(re.search, last_line))
        assert text.count("╭") == text.count("╰") == 1 and text.count("speed") == 1, text
    terminal.process.send_signal(signal.SIGUSR1)
    code, text = terminal.end()
    assert code == 0 and "╭" not in text and "summary" in text


def test_a_panel_that_is_higher_than_the_window_leaves_nothing_behind(tmp_path: Path) -> None:
    terminal = display(tmp_path, rows=6)
    terminal.read_until(lambda text: "╭" in text and "..." in text)
    terminal.process.send_signal(signal.SIGUSR1)
    seen = len(terminal.raw)
    assert terminal.end()[0] == 0
    assert b"summary" in terminal.raw[seen:] and "╰".encode() not in terminal.raw[seen:].partition(b"summary")[0]


def test_the_cursor_is_never_hidden(tmp_path: Path) -> None:
    terminal = display(tmp_path)
    terminal.read_until(lambda text: "╰" in text)
    terminal.process.kill()
    assert terminal.end()[0] == -signal.SIGKILL
    assert b"\x1b[?25l" not in terminal.raw and not terminal.screen.cursor.hidden


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "unknown"}])
def test_a_terminal_that_cannot_take_lines_back_gets_plain_ones(tmp_path: Path, environment: dict[str, str]) -> None:
    code, text = display(tmp_path, "display.figures(5)", environment).end()
    assert code == 0 and "╭" not in text and "step 5/9  epoch 0.50  loss 1.5000" in text and "summary" in text


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_file_gets_plain_lines_whatever_colours_are_asked_for(tmp_path: Path, variable: str) -> None:
    script = textwrap.dedent(DISPLAY).format(line=trained(5, 1.5), then="display.figures(5)")
    command = [sys.executable, "-c", script, str(tmp_path / "log")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, variable: "1"}, stdout=subprocess.PIPE, timeout=60)
    text = done.stdout.decode()
    assert done.returncode == 0 and "╭" not in text and "\x1b[?25l" not in text and "step 5/9  epoch 0.50" in text


def test_where_there_is_no_unicode_there_are_no_bars(tmp_path: Path) -> None:
    terminal = display(tmp_path, environment={"PYTHONIOENCODING": "ascii"})
    text = terminal.read_until(lambda text: "printed by" in text and "5/9" in text and "1.5000 smoothed" in text)
    assert "?" not in text
    terminal.process.send_signal(signal.SIGUSR1)
    code, text = terminal.end()
    assert code == 0 and "1.5000 smoothed" in text and "?" not in text


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


def training(shards: Path, run: Path, *more: str, ranks: int = 1) -> list[str]:
    """The command, as its own rank or as the supervisor of several."""
    recipe = run.parent / "recipe.yaml"
    recipe.write_text(RECIPE)
    begin = [sys.executable, str(TRAIN)]
    if ranks > 1:
        begin = [sys.executable, "-m", "fcn_dist", "train", "--ranks", str(ranks)]
    return [*begin, "--shards", str(shards), "--output", str(run), "--recipe", str(recipe), *more]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_that_is_asked_to_stop_leaves_table_and_reason_on_the_screen(
    shards: Path, tmp_path: Path, ranks: int
) -> None:
    terminal = Terminal(training(shards, tmp_path / "run", "--steps", "5000", "--set", "log.every=7", ranks=ranks))
    terminal.read_until(lambda text: "╰" in text and "images/s" in text)
    terminal.process.send_signal(signal.SIGINT)
    code, text = terminal.end()
    assert code == EXIT_REQUEUE, text
    assert "╭" not in text and text.index("summary") < text.index("stopped after step"), text
    assert re.search(r"saved +│ step \d+, \d s ago", text), text
    last = int(re.findall(r"stopped after step (\d+)", text)[0])
    assert re.search(rf"asked to stop \(.*rank 0: SIG.*\): saving step {last}", text), text
    assert f"{last} steps in" in text and f"to step {last} of 5000" in text, text
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["event"] == "train"]
    assert steps == [*range(7, last, 7), last], "also of the steps after the last that was due"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_whose_window_is_closed_saves_and_stops(shards: Path, tmp_path: Path, ranks: int) -> None:
    run = tmp_path / "run"
    terminal = Terminal(training(shards, run, "--steps", "5000", "--set", "checkpoint.every=0", ranks=ranks))
    terminal.read_until(lambda text: "╰" in text and "images/s" in text)
    terminal.close()
    terminal.process.send_signal(signal.SIGHUP)
    assert terminal.process.wait(TIME_LIMIT) == EXIT_REQUEUE
    assert len(list((run / "checkpoints").glob("step-*"))) == 1
    assert "standard output is lost from here on" in (run / "ranks" / "rank-00000.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_goes_on_when_the_reader_of_its_output_is_gone(shards: Path, tmp_path: Path, ranks: int) -> None:
    command = training(shards, tmp_path / "run", "--steps", "6", ranks=ranks)
    reader, writer = os.pipe()
    with subprocess.Popen(command, cwd=ROOT, stdout=writer, stderr=writer, start_new_session=True) as process:
        os.close(writer)
        assert os.read(reader, 1)
        os.close(reader)
        assert process.wait(TIME_LIMIT) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2, 3, 4, 5, 6]
