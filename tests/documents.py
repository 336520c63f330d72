"""README and docs as data: their blocks of code, the commands in them, and what real parsers make of those.

A block is fenced, or indented by four spaces after a blank line or a heading. It holds commands, Python, YAML, or
something to look at, which is named in `SHOWN` by its first line, so that no command is taken for a drawing.
"""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from fcn_dist.commands import supervise
from fcn_dist.commands.names import COMMANDS
from fcn_dist.commands.train import run_config
from fcn_dist.training.deepspeed_config import resolve
from fcn_dist.training.entry import Start
from fcn_dist.training.schedule import check_warmup

ROOT = Path(__file__).resolve().parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
PROGRAMS = {"python", "deepspeed", "fcn-dist", "torchrun", "bash", "sbatch", "curl", "pip", "cp"}
PROGRAMS |= {"tensorboard", "wandb"}
READERS_OWN = {"RECIPE", "CONFIG", "street.yaml"}  # files that are not in the checkout
ELISION = "..."  # a word that stands for the other arguments


@dataclass(frozen=True)
class Block:
    """Code on a page."""

    page: str
    line: int  # of the page, from 1, where it begins
    language: str  # of its fence
    text: str

    @property
    def kind(self) -> str:
        """What it holds."""
        if self.language:
            return self.language
        first = self.text.split(maxsplit=1)[0]
        if first in PROGRAMS or re.match(r"[A-Z_]+=\S+ |for ", self.text):
            return "commands"
        return "python" if first in ("from", "import") else "shown"

    @property
    def commands(self) -> list[str]:
        """Each as it would be typed, on one line and without its comment."""
        joined = re.sub(r"\s*\\\n\s*", " ", self.text)
        return [line for line in (uncommented(line) for line in joined.splitlines()) if line]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def uncommented(line: str) -> str:
    """Without a comment that stands apart from the command, as a shell takes it."""
    return re.sub(r"(^|\s+)# .*$", "", line).strip()


def blocks(page: str, text: str) -> list[Block]:
    """All code of a page, in its order."""
    found: list[Block] = []
    lines: list[str] = []
    start, language, fenced = 0, "", False

    def end() -> None:
        if "".join(lines).strip():
            found.append(Block(page, start, language, "\n".join(lines).strip("\n")))
        lines.clear()

    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            end()
            fenced, start, language = not fenced, number + 1, line[3:]
            language = language if fenced else ""
        elif fenced or line.startswith("    ") or (lines and not line.strip()):
            if not lines:
                start = number
            lines.append(line if fenced else line[4:])
        else:
            end()
    end()
    return found


BLOCKS = [block for page, path in PAGES.items() for block in blocks(page, path.read_text())]


class Parsed(Exception):
    """A script has parsed its arguments."""


@contextmanager
def parsing_alone() -> Iterator[None]:
    """Within, a script ends where its arguments are parsed, in place of what it would do next."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(parser: argparse.ArgumentParser, arguments: Any = None) -> NoReturn:
        parse(parser, arguments)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_end), suppress(Parsed):
        yield


def loosen(parser: argparse.ArgumentParser) -> None:
    """Take a command line of which some arguments are left out."""
    for group in parser._mutually_exclusive_groups:
        group.required = False
    for action in parser._actions:
        action.required = False
        if not action.option_strings and action.nargs in (None, "+"):
            action.nargs = "*" if action.nargs == "+" else "?"


def check_options(command: str) -> None:
    """Have the parsers of all programs that a command line names take it; raises or exits where one refuses.

    Of training and planning, the recipe with its overrides and the DeepSpeed configuration are read as well.
    """
    words = shlex.split(command)
    whole = ELISION not in words
    words = [word for word in words if word != ELISION]
    program, *rest = words
    script = next(
        (word for word in words if re.match(r"(launch|shards|benchmarks|tests)/\S+\.(py|sh|sbatch)$", word)), ""
    )
    if script and not (ROOT / script).is_file():
        raise FileNotFoundError(f"{command}: there is no {script}")
    if program in ("deepspeed", "torchrun"):
        check_launcher(program, rest)
    if program == "fcn-dist":
        check_command(rest[0], rest[1:], whole)
    elif script.endswith(".sbatch"):
        check_command("train", words[words.index(script) + 1 :], whole)
    elif script.startswith("benchmarks/"):
        with parsing_alone(), mock.patch.object(sys, "argv", words[words.index(script) :]):
            runpy.run_path(str(ROOT / script), run_name="__main__")
            raise LookupError(f"{script} has parsed nothing")
    elif script.endswith(".py"):
        check_command(Path(script).stem, words[words.index(script) + 1 :], whole, alone=True)


def check_launcher(program: str, arguments: list[str]) -> None:
    """Its own options, which stand before the script."""
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(arguments)
        return
    from deepspeed.launcher.runner import parse_args

    parse_args(arguments)


def check_command(name: str, arguments: list[str], whole: bool, alone: bool = False) -> None:
    """One of ours, `alone` as a script that a launcher starts."""
    if name not in COMMANDS:
        raise LookupError(f"no command {name}")
    if name == "train" and not alone:
        _, arguments = supervise.build_parser().parse_known_args(arguments)
    parser = import_module(f"fcn_dist.commands.{name}").build_parser()
    if not whole:
        loosen(parser)
    options = parser.parse_args(arguments)
    if name == "train":
        check_training(options, arguments, whole)
    elif hasattr(options, "overrides"):
        from fcn_dist.recipefile import load_recipe

        load_recipe(in_checkout(options.recipe), options.overrides)


def check_training(options: argparse.Namespace, arguments: list[str], whole: bool) -> None:
    """Recipe and configuration as the run would have them, which must be enough to begin with."""
    arguments = [str(in_checkout(Path(word))) if word.startswith("launch/") else word for word in arguments]
    for placeholder in READERS_OWN & set(arguments):
        del arguments[arguments.index(placeholder) - 1 : arguments.index(placeholder) + 1]
        whole = False
    for name in ("shards", "output"):
        if getattr(options, name) is None:
            arguments += [f"--{name}", "anywhere"]
    arguments = [word for word in arguments if word != "--resume"]  # which reads the run, and there is none here
    config = run_config(arguments)
    if whole and not options.resume and config.start is not Start.RESUME:
        resolve(config.deepspeed, config.recipe, world_size=1)
        if config.recipe.schedule.steps:
            check_warmup(config.recipe.schedule, config.recipe.schedule.steps)


def in_checkout(path: Path | None) -> Path | None:
    """A path that a page gives from the checkout's top."""
    return path if path is None else ROOT / path
