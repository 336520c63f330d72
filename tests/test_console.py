"""What is printed is what was meant: names of files and classes are never read as markup."""

import pytest

from fcn_dist.console import console, status_console
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
