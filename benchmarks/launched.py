"""A benchmark's ranks, under the real launcher: a script in, why it failed out."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from fcn_dist.console import status_console

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT = 600.0  # seconds


def launch(command: list[str], ranks: int, scratch: Path, limit: float = TIME_LIMIT) -> str:
    """Run `command`, a script and its arguments, on so many ranks; empty, or why it failed, within `limit` seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", port]
    log = scratch / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*launcher, *command],
            cwd=scratch,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, so that whatever it started ends with it
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"not done after {limit:.0f} s"
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        status_console.print(log.read_text()[-4000:])
        return f"exit code {code}"
    return ""
