"""What is printed is what was meant: names of files and classes are never read as markup."""

import errno
import os

import pytest

from fcn_dist.console import console, run_command, status_console
from fcn_dist.errors import counted
from fcn_dist.training.display import TrainingDisplay

NAME = "runs/camvid[x]/step [bold]1[/]"


def test_news_of_training_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingDisplay(steps=3, first_step=0, shown=True) as progress:
        progress.say(NAME)
    assert NAME in capsys.readouterr().out


def test_results_and_progress_show_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.print(NAME)
    status_console.print(NAME)
    captured = capsys.readouterr()
    assert NAME in captured.out and NAME in captured.err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EIO])
def test_an_error_of_no_file_and_one_that_nobody_can_mend_keep_their_traceback(number: int) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number), *(["a.txt"] if number == errno.EIO else []))

    with pytest.raises(OSError, match=os.strerror(number)):
        run_command(fail)


def test_one_thing_is_not_several() -> None:
    assert [counted(number, "rank") for number in (0, 1, 2, 1000)] == ["0 ranks", "1 rank", "2 ranks", "1,000 ranks"]
