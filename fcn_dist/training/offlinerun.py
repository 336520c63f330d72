"""What a board shows in, a run for Weights & Biases out, in RUN/wandb: on disk alone, for `wandb sync` to send.

Sending a folder of a run replaces what was sent of it before. So every start tells the whole run anew from the journal,
in a folder of its own under the same id, and no step is there twice.
"""

import os
import queue
import re
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fcn_dist.errors import UserError
from fcn_dist.files import write_text
from fcn_dist.training.boards import Shown
from fcn_dist.training.layers import HIGHEST, LOWEST
from fcn_dist.training.runfolder import RunRecord

if TYPE_CHECKING:
    import wandb

WANDB_DIR, ID_NAME = "wandb", "fcn-dist-run-id"
PROJECT = "fcn-dist"  # unless WANDB_PROJECT says another
SERVICE = "wandb-core"  # its process, of which one is started
FLUSHES_EVERY = 1.0  # seconds; what that process has not written yet is lost if it is killed
ANSWERS_WITHIN = 60.0  # seconds that training waits for it at most
WAITING = 1000  # lines
# Nothing is to be sent, reports of wandb's own errors included. Its process takes this over.
SILENCE = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
# The name that it gives to the file of a picture: the picture's own, step and hash.
PICTURE = re.compile(r"(?P<name>.+)_(?P<step>\d+)_[0-9a-f]{20}")


class OfflineRun:
    """A writer of boards. What fails here is said once, and ends this writer, not the training."""

    # wandb is spoken to in a thread: if its process has stopped, a call never comes back.
    def __init__(self, run_dir: Path, record: RunRecord, say: Callable[[str], None]) -> None:
        """Raises UserError if the extra is not installed."""
        self._wandb, self._say, self._step = wandb_module(), say, 0
        self._lines: queue.Queue[Shown | None] = queue.Queue(WAITING)
        self._failure: Exception | None = None
        self._told = False
        self._before = sorted((run_dir / WANDB_DIR).glob("offline-run-*"))
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        try:
            self._run = begin(self._wandb, run_dir, record)
            self._folder = Path(self._run.dir).parent
        except Exception as error:
            self._failure = error
        else:
            self._thread.start()

    def write(self, shown: Shown) -> None:
        """Take in one line's."""
        self._step = shown.step
        self._hand_over(shown)
        self._tell()

    def close(self) -> None:
        """Write what is left, and end wandb's process."""
        self._hand_over(None)
        if self._failure is None:
            self._thread.join(ANSWERS_WITHIN)
            if self._thread.is_alive():
                self._failure = unanswered()
        if self._failure is not None:
            kill_service(self._wandb)
        else:
            for folder in self._before:
                shutil.rmtree(folder, ignore_errors=True)
        self._tell()

    def _hand_over(self, shown: Shown | None) -> None:
        if self._failure is None:
            try:
                self._lines.put(shown, timeout=ANSWERS_WITHIN)
            except queue.Full:
                self._failure = unanswered()

    def _tell(self) -> None:
        if self._failure is not None and not self._told:
            self._told = True
            reason = f"{type(self._failure).__name__}: {self._failure}"
            self._say(
                f"Weights & Biases is left out from about step {self._step} on ({reason}); training goes on, and what "
                "is missing will be told when the run is resumed"
            )

    def _work(self) -> None:
        """The thread."""
        try:
            while (shown := self._lines.get()) is not None:
                self._log(shown)
            self._run.finish()
            self._wandb.teardown()
            check_log(self._folder)
        except Exception as error:
            self._failure = self._failure or error

    def _log(self, shown: Shown) -> None:
        values: dict[str, Any] = dict(shown.figures)
        for name, shares in shown.histograms.items():
            # By exponents: on an axis of magnitudes all of them would lie in one line.
            edges = list(range(LOWEST, HIGHEST + 1))
            values[f"log2 of {name}"] = self._wandb.Histogram(np_histogram=(shares.tolist(), edges))
        values |= {name: self._wandb.Image(picture) for name, picture in shown.pictures.items()}
        if shown.event == "evaluate" and not shown.pictures:
            values |= {name: self._wandb.Image(str(path)) for name, path in self._pictures_before(shown.step)}
        if values:
            self._run.log({**values, "_timestamp": shown.time}, step=shown.step)

    def _pictures_before(self, step: int) -> Iterator[tuple[str, Path]]:
        """Of an evaluation that is not the last: the folders of earlier starts have them."""
        for folder in self._before:
            pictures = folder / "files" / "media" / "images"
            for path in sorted(pictures.rglob("*.png")):
                found = PICTURE.fullmatch(str(path.relative_to(pictures).with_suffix("")))
                if found and int(found["step"]) == step:
                    yield found["name"], path


def unanswered() -> TimeoutError:
    """What is said of a process that does not go on."""
    return TimeoutError(f"no answer within {ANSWERS_WITHIN:.0f} s")


@contextmanager
def kept_to_itself() -> Iterator[None]:
    """What wandb changes of this process in the block is undone; its own, which begins there, is told SILENCE."""
    variables, exits = {**os.environ}, (sys.exit, sys.excepthook)
    os.environ.update(SILENCE)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        sys.exit, sys.excepthook = exits


def wandb_module() -> ModuleType:
    """Raises UserError where wandb is not installed."""
    try:
        with kept_to_itself():
            import wandb
    except ImportError as error:
        raise UserError(
            f"log.wandb is set, and wandb cannot be imported ({error}); the extra of that name is needed: "
            "pip install 'fcn-dist[wandb]', or leave the setting out"
        ) from error
    return wandb


def begin(wandb: Any, run_dir: Path, record: RunRecord) -> "wandb.Run":
    """Start wandb's process, and the run under the id that it has from its first start."""
    id_path = run_dir / WANDB_DIR / ID_NAME
    if not id_path.exists():
        id_path.parent.mkdir(exist_ok=True)
        write_text(id_path, secrets.token_hex(4))
    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=FLUSHES_EVERY,
    )
    with kept_to_itself():
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=id_path.read_text(),
            name=run_dir.resolve().name,
            dir=run_dir,
            mode="offline",
            save_code=False,
            config=vars(record),
            settings=settings,
        )


def check_log(folder: Path) -> None:
    """Raise OSError for what wandb's process could not write, such as on a full disk: it says so in its log alone."""
    for line in (folder / "logs" / "debug-internal.log").read_text().splitlines():
        if '"level":"ERROR"' in line:
            raise OSError(line)


def kill_service(wandb: Any) -> None:
    """Leave nothing of a process that does not answer, or is gone."""
    children = [int(path.name) for path in Path("/proc").glob("[0-9]*") if is_service(path)]
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    # Else it would be ended, in vain, when this process ends.
    with suppress(Exception):
        wandb.teardown()
    for pid in children:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def is_service(process: Path) -> bool:
    """Whether a folder of /proc is that of wandb's process, a child of this one."""
    with suppress(OSError):
        name, _, rest = (process / "stat").read_text().partition("(")[2].rpartition(")")
        return name == SERVICE and int(rest.split()[1]) == os.getpid()
    return False
