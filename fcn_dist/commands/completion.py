"""`fcn-dist completion SHELL`: a script that completes commands, options, choices, files and recipe keys.

The script holds them all, so that completing starts no Python.
"""

import argparse
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import shtab

from fcn_dist.commands.names import COMMANDS, FRONTS
from fcn_dist.config import Recipe
from fcn_dist.errors import named

# Where each shell looks for it; zsh, where its fpath has that folder.
PLACES = {
    "bash": "~/.local/share/bash-completion/completions/fcn-dist",
    "zsh": "~/.zfunc/_fcn-dist",
    "fish": "~/.config/fish/completions/fcn-dist.fish",
}
FOLDERS = ("--shards", "--run", "run", "runs")  # arguments that are folders, by their options or else their own names

SECTIONS: dict[str, Any] = get_type_hints(Recipe)
# What is typed after --set. A value follows the "=", so no space may.
KEYS = " ".join(f"{name}.{key.name}=" for name, section in SECTIONS.items() for key in fields(section))
COMPLETES_KEYS = {
    "bash": "_fcn_dist_keys",
    "zsh": "_fcn_dist_keys",
    "fish": f"(string split ' ' '{KEYS}')",
    "preamble": {
        "bash": f'_fcn_dist_keys() {{ compgen -W "{KEYS}" -- "$1"; }}',
        "zsh": f"_fcn_dist_keys() {{ compadd -S '' -- {KEYS} }}",
    },
}
# In bash this can be said only where all candidates are known.
BASH_END = """
_fcn_dist() {
  _shtab_fcn_dist "$@"
  [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
  return 0
}
complete -o bashdefault -F _fcn_dist fcn-dist
"""


def main(argv: list[str]) -> None:
    """Print the script."""
    shell = build_parser().parse_args(argv).shell
    without: list[str] = []
    with redirect_stdout(sys.stderr):  # what libraries say while they are imported is no part of a script
        script = shtab.complete(all_commands(without), shell)
    print(script + (BASH_END if shell == "bash" else ""))
    if without:
        print(
            f"the options of {named(without)} are left out, as what they need is not installed; pip install "
            "'fcn-dist[train]', then make the script again",
            file=sys.stderr,
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "fcn-dist completion",
        description="Print a script that completes commands, options, files and recipe keys. Made once, it is read by "
        "every new shell:",
        epilog="\n".join(f"  {shell:<6}fcn-dist completion {shell} > {path}" for shell, path in PLACES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=tuple(PLACES), help="which it is for")
    return parser


def all_commands(without: list[str]) -> argparse.ArgumentParser:
    """`fcn-dist` as one command line; a command whose extra is not installed is there without its options.

    The names of such commands are added to `without`.
    """
    parser = argparse.ArgumentParser("fcn-dist")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    for name, summary in COMMANDS.items():
        modules = {name, FRONTS.get(name, name)}
        parsers = [one for module in modules if (one := parser_of(module))]
        if len(parsers) < len(modules):
            without.append(name)
        command = commands.add_parser(name, help=summary, parents=parsers, conflict_handler="resolve")
        for action in command._actions:
            complete_values(action)
    return parser


def parser_of(module: str) -> argparse.ArgumentParser | None:
    """None where an extra is missing."""
    try:
        parser: argparse.ArgumentParser = import_module(f"fcn_dist.commands.{module}").build_parser()
    except ModuleNotFoundError:
        return None
    return parser


def complete_values(action: Any) -> None:
    """Say what may stand in the place of an argument."""
    if action.dest == "overrides":
        action.complete = COMPLETES_KEYS
    elif action.dest in FOLDERS or set(action.option_strings) & set(FOLDERS):
        action.complete = shtab.DIRECTORY
    elif (action.type is Path or not action.option_strings) and not action.choices:
        action.complete = shtab.FILE
