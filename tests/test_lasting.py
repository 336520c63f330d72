"""Output that nobody takes any more: what is lost, and that nothing else is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fcn_dist.errors import EXIT_REQUEUE
from fcn_dist.lasting import Lasting, lasting_output

ROOT = Path(__file__).parents[1]
COMMAND = """
import sys
from fcn_dist.console import run_command
from fcn_dist.errors import EarlyEnd
from fcn_dist.lasting import lasting_output

def command():
    with lasting_output():
        print("figures", flush=True)
        print("more figures")
    raise EarlyEnd("stopped after step 3", 75)

sys.exit(run_command(command))
"""


def test_what_a_lost_reader_would_have_read_is_dropped() -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as file:  # noqa: PTH123 - a descriptor
        stream = Lasting(file, "a file")
        assert stream.write("taken\n") == 6
        stream.flush()
        assert os.read(reader, 100) == b"taken\n"
        os.close(reader)
        for _ in range(3):
            assert stream.write("dropped\n") == 8
            stream.flush()
        assert Path(f"/proc/self/fd/{writer}").readlink() == Path(os.devnull), "what others write is dropped as well"
    # The end of the block has flushed the file itself, and did not raise.


def test_a_closed_stream_is_no_error() -> None:
    with open(os.devnull, "w") as file:  # noqa: PTH123 - no path of ours
        stream = Lasting(file, "a file")
    assert stream.write("dropped") == 7
    stream.flush()


def test_a_reader_that_is_slow_gets_what_comes_later() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "w", newline="\n") as file:  # noqa: PTH123 - a descriptor
        stream = Lasting(file, "a file")
        for _ in range(100):  # a pipe takes 64 KiB
            stream.write("x" * 4096)
            stream.flush()
        os.read(reader, 1 << 20)
        stream.write("later\n")
        stream.flush()
        assert os.read(reader, 1 << 20).endswith(b"later\n")
    os.close(reader)


def test_characters_that_a_stream_does_not_have_become_question_marks(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="ascii") as file:
        Lasting(file, "a file").write("loss ▁▂, größer\n")
    assert (tmp_path / "log").read_text() == "loss ??, gr??er\n"


def test_streams_are_as_before_after_the_block() -> None:
    before = sys.stdout, sys.stderr
    with lasting_output():
        assert isinstance(sys.stdout, Lasting) and isinstance(sys.stderr, Lasting)
        assert sys.stdout.isatty() is before[0].isatty()
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("lost", [("stdout",), ("stderr",), ("stdout", "stderr")], ids="+".join)
@pytest.mark.parametrize("how", ["full", "closed"])
def test_the_exit_code_is_that_of_the_command(how: str, lost: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:  # noqa: PTH123 - no path of ours
        nowhere = full.fileno() if how == "full" else writer
        out, err = (nowhere if name in lost else subprocess.PIPE for name in ("stdout", "stderr"))
        done = subprocess.run([sys.executable, "-c", COMMAND], cwd=ROOT, timeout=60, stdout=out, stderr=err)
    os.close(writer)
    assert done.returncode == EXIT_REQUEUE, done
    assert done.stdout in (None, b"figures\nmore figures\n")
    if done.stderr is not None:
        news, told = done.stderr.splitlines()
        assert news.startswith(b"what is written to standard output is lost from here on: [Errno ")
        assert told == b"stopped after step 3"
