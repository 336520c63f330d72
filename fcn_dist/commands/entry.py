"""`fcn-dist COMMAND ...`: every script as a subcommand of the installed package."""

import gc
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

import fcn_dist
import fcn_dist.lastly  # before whatever else has something to do at the end
from fcn_dist.commands.names import COMMANDS, FRONTS

try:
    from fcn_dist.console import run_command
except ModuleNotFoundError as error:
    missing = str(error.name).partition(".")[0]
    print(
        f"error: {sys.executable} has no {missing}; the environment that fcn_dist is installed in is needed; in the "
        "checkout, bash launch/quickstart.sh makes one, and . .venv/bin/activate enters it",
        file=sys.stderr,
    )
    sys.exit(2)
from fcn_dist.errors import UserError
from fcn_dist.outcome import leave_outcome

# Packages that a command may miss, by the extra of setup.cfg that brings them.
EXTRAS = {
    "train": {"deepspeed", "webdataset", "scipy"},
    "onnx": {"onnx", "onnxscript", "onnxruntime"},
    "serve": {"fastapi", "starlette", "uvicorn", "python_multipart"},
}


def run_script(name: str, argv: Sequence[str] | None = None) -> int:
    """Run command `name` with the given arguments (those of the process if None); returns its exit code."""
    return _run(lambda: _command(name)(sys.argv[1:] if argv is None else list(argv)))


def main() -> int:
    """The console script."""
    # The deepspeed launcher puts its own argument first; ranks are read from the environment.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: fcn-dist COMMAND ...\n\ncommands:")
        for name, summary in COMMANDS.items():
            print(f"  {name:<12}{summary}")
        print("\n`fcn-dist COMMAND --help` lists a command's options.")
        return 0
    if arguments[0] == "--version":
        print(fcn_dist.__version__)
        return 0
    return _run(lambda: _dispatch(arguments))


def _run(command: Callable[[], None]) -> int:
    code = 1  # of a bug, whose traceback Python prints
    try:
        code = run_command(lambda: _with_extras(command))
    except SystemExit as end:  # of the parser
        code = end.code if isinstance(end.code, int) else 1
        raise
    except KeyboardInterrupt:
        sys.excepthook = _tell_of_interruption
        raise  # Python ends by the signal then, which tells a shell to end its loop, too
    finally:
        leave_outcome(code)
    return code


def _tell_of_interruption(*_: object) -> None:
    print("interrupted", file=sys.stderr, flush=True)


def _with_extras(command: Callable[[], None]) -> None:
    """A command that needs more than inference does says which extra has it."""
    try:
        command()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
        if not extra:
            raise
        raise UserError(
            f"this command needs {package}, which is not installed; install the extra: pip install 'fcn-dist[{extra}]'"
        ) from error


def _dispatch(arguments: list[str]) -> None:
    name, *rest = arguments
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}; one of {', '.join(COMMANDS)} is needed")
    sys.argv[:] = [f"fcn-dist {name}", *rest]  # as a script of that name would have it
    _command(FRONTS.get(name, name))(rest)


def _command(name: str) -> Callable[[list[str]], None]:
    gc.disable()  # of what imports make nothing is garbage, and to look for it takes 7 % of torch's
    try:
        main: Callable[[list[str]], None] = import_module(f"fcn_dist.commands.{name}").main
    finally:
        gc.enable()
    return main
