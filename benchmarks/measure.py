"""Contenders in, their figures out: rounds are interleaved, and every measurement has a process of its own.

So no contender inherits another's threads, caches or shared memory, and what disturbs the machine for a while
disturbs them all.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fcn_dist.console import status_console

INSTALL = "pip install -e '.[benchmark]'"
TIME_LIMIT = 900.0  # seconds a measurement; what hangs is named as failed, not waited for
_RUNNER = Path(__file__).with_name("one.py")


class Failed(Exception):
    """A measurement that gave no figures; the message is the end of what it printed."""


@dataclass(frozen=True)
class Contender:
    """A row of a table: `target` is `MODULE:FUNCTION`, which takes `options` and returns figures by name."""

    name: str
    target: str
    options: dict[str, Any]
    does: str = ""  # what it does and what not, for the table
    needs: str = ""  # module that must be importable
    writes: bool = False  # takes `out`, a folder of its own that is removed afterwards
    problem: str = ""  # why it cannot be measured, if that is known before


@dataclass
class Measured:
    """What became of a contender: figures of each round, or why there are none."""

    contender: Contender
    rounds: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""

    def figures(self, name: str) -> list[float]:
        """One figure over the rounds."""
        return [round_[name] for round_ in self.rounds]


def run_once(contender: Contender, scratch: Path, limit: float = TIME_LIMIT) -> dict[str, Any]:
    """The figures of one measurement, which may take `limit` seconds. Raises Failed."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        result = Path(folder) / "figures.json"
        options = contender.options | ({"out": str(Path(folder) / "out")} if contender.writes else {})
        if contender.writes:
            os.sync()  # or it would wait for what the one before it left to be written
        process = subprocess.Popen(
            [sys.executable, str(_RUNNER), contender.target, json.dumps(options), str(result)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"TMPDIR": folder},  # what it forgets there goes, too
            start_new_session=True,  # a group of its own, so that whatever it started ends with it
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise Failed(f"not done after {limit:.0f} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode or not result.exists():
            raise Failed("\n".join(output.strip().splitlines()[-8:]) or f"exit code {process.returncode}")
        figures: dict[str, Any] = json.loads(result.read_text())
        return figures


def run_rounds(
    contenders: Sequence[Contender], rounds: int, scratch: Path, time_limit: float = math.inf
) -> list[Measured]:
    """Every contender once a round, every other round in reverse order. One that fails is not tried again.

    After `time_limit` seconds it goes on with what there is.
    """
    deadline = time.monotonic() + time_limit
    measured = [Measured(contender, problem=contender.problem or missing(contender)) for contender in contenders]
    for number in range(rounds):
        for one in measured if number % 2 == 0 else reversed(measured):
            if one.problem:
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                one.problem = "" if one.rounds else f"not measured: {time_limit:.0f} s were over before its turn"
                continue
            status_console.print(f"round {number + 1} of {rounds}: {one.contender.name}")
            try:
                one.rounds.append(run_once(one.contender, scratch, min(TIME_LIMIT, left)))
            except Failed as failure:
                if one.rounds and time.monotonic() >= deadline:
                    continue
                one.problem = f"failed: {failure}"
                status_console.print(one.problem)
    return measured


def missing(contender: Contender) -> str:
    """What the table says of a contender that is not installed; empty if it is."""
    if not contender.needs or find_spec(contender.needs):
        return ""
    return f"missing: {contender.needs} is not installed; {INSTALL}"
