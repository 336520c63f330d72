"""What shells offer after `fcn-dist`: real ones, asked through their own machinery for completing."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fcn_dist.commands import completion
from fcn_dist.commands.names import COMMANDS

SHELLS = ("bash", "zsh", "fish")
pytestmark = pytest.mark.slow  # the scripts take in all commands, and with them all libraries


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Those that the command prints, by shell, in a folder with things to complete."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "camvid.yaml").touch()
    (folder / "shards-ade").mkdir()
    (folder / "shards.txt").touch()
    found = {}
    for shell in SHELLS:
        command = [sys.executable, "-m", "fcn_dist", "completion", shell]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found[shell] = folder / f"completes.{shell}"
        found[shell].write_text(done.stdout)
    return found


def offered_by_bash(script: Path, line: str) -> list[str]:
    """What bash's own function for completing leaves for a line."""
    asks = f"""
source {script}
compopt() {{ :; }}  # which is for a terminal
read -ra COMP_WORDS <<<"$1"
[[ $1 == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
function=$(complete -p fcn-dist | sed "s/.*-F \\([^ ]*\\) .*/\\1/")
$function fcn-dist "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf "%s\\n" "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", asks, "bash", line], cwd=script.parent, capture_output=True, text=True, timeout=30, check=True
    )
    assert not done.stderr
    return done.stdout.split()


def offered_by_fish(script: Path, line: str) -> list[str]:
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source {script}; complete -C '{line}'"],
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert not done.stderr
    return [one.partition("\t")[0] for one in done.stdout.splitlines()]


@contextmanager
def terminal(command: list[str], folder: Path) -> Iterator[int]:
    """A shell in a pseudo-terminal of its own."""
    pid, descriptor = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvpe(command[0], command, {**os.environ, "TERM": "dumb", "PS1": "ready> ", "HOME": str(folder)})
    try:
        yield descriptor
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(descriptor)


def until(descriptor: int, pattern: str, seconds: float = 60) -> str:
    """What the terminal shows, up to what is awaited."""
    shown, deadline = "", time.monotonic() + seconds
    while not re.search(pattern, shown):
        left = deadline - time.monotonic()
        assert left > 0 and select.select([descriptor], [], [], left)[0], f"no {pattern!r} in {shown!r}"
        shown += os.read(descriptor, 65536).decode(errors="replace")
    return shown


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_commands_options_choices_keys_and_files_are_offered(shell: str, scripts: dict[str, Path]) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")

    def offered(line: str) -> list[str]:
        return (offered_by_bash if shell == "bash" else offered_by_fish)(scripts[shell], line)

    assert set(COMMANDS) <= set(offered("fcn-dist "))
    assert offered("fcn-dist comp") == ["completion"]
    # Those of the command that starts the ranks, and of the rank.
    assert {"--ranks", "--resume", "--auto-resume"} <= set(offered("fcn-dist train --"))
    assert "--local_rank" not in offered("fcn-dist train --")
    assert set(offered("fcn-dist predict m.safetensors a.jpg --precision ")) == {
        "auto",
        "float32",
        "bfloat16",
        "float16",
    }
    assert "log.wandb=" in offered("fcn-dist train --set log.")
    assert "model.head_width=" in offered("fcn-dist plan --gpus 8 --set model.he")
    assert set(offered("fcn-dist completion ")) == set(SHELLS)
    assert [one.rstrip("/") for one in offered("fcn-dist train --recipe rec")] == ["recipes"]
    assert offered("fcn-dist train --recipe recipes/c") == ["recipes/camvid.yaml"]
    assert [one.rstrip("/") for one in offered("fcn-dist train --shards sh")] == ["shards-ade"], "no file"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_tab_key_completes_in_a_terminal(shell: str, scripts: dict[str, Path]) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    start = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}[shell]
    load = {"bash": "source {}", "zsh": 'autoload -Uz compinit && compinit -u -D; eval "$(<{})"'}[shell]
    with terminal(start, scripts[shell].parent) as descriptor:
        until(descriptor, "ready> ")
        os.write(descriptor, f"{load.format(scripts[shell])}; echo load''ed\n".encode())
        until(descriptor, r"loaded[\s\S]*ready> ")
        for typed, wanted in (
            ("fcn-dist comp\t", r"completion "),
            ("fcn-dist train --auto\t", r"--auto-resume "),
            ("fcn-dist train --set log.wa\t7", r"log\.wandb=7"),
            ("fcn-dist train --recipe rec\t", r"recipes/"),
        ):
            os.write(descriptor, typed.encode())
            until(descriptor, wanted)
            os.write(descriptor, b"\x15\n")  # leave the line
            until(descriptor, "ready> ")


def test_commands_whose_libraries_are_not_installed_are_named_as_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser_of = completion.parser_of
    monkeypatch.setattr(completion, "parser_of", lambda name: None if name in ("train", "plan") else parser_of(name))
    completion.main(["bash"])
    printed = capsys.readouterr()
    assert "the options of plan, train are left out" in printed.err and "--sha256" in printed.out
    monkeypatch.undo()
    completion.main(["bash"])
    assert "left out" not in capsys.readouterr().err
