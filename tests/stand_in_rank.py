"""A rank that only waits: for a signal, which it counts and answers as training does, or for the file FOLDER/finish.

    stand_in_rank.py FOLDER [deaf]

It tells FOLDER/<rank>.pids its process and that of a child that ignores signals, as loader processes do, and what it
hears FOLDER/<rank>.signals. A deaf rank hears no signal, like one that waits for a peer in a collective.
"""

import os
import signal
import sys
import time
from pathlib import Path

from fcn_dist.errors import EXIT_REQUEUE
from fcn_dist.outcome import leave_outcome

FOLDER, RANK = Path(sys.argv[1]), os.environ["RANK"]
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
received: list[int] = []


def main() -> None:
    """Wait, then end as a rank does."""
    child = os.fork()
    if not child:
        for signum in STOPS:
            signal.signal(signum, signal.SIG_IGN)
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(0)
    for signum in STOPS:
        signal.signal(signum, signal.SIG_IGN if "deaf" in sys.argv else lambda number, _: received.append(number))
    pids = FOLDER / f"{RANK}.pids.partial"
    pids.write_text(f"{os.getpid()} {child}")
    pids.rename(FOLDER / f"{RANK}.pids")
    while not received and not (FOLDER / "finish").exists():
        time.sleep(0.05)
    code = EXIT_REQUEUE if received else int((FOLDER / "finish").read_text())
    if received:
        time.sleep(1)  # saving; a second signal would be seen
    (FOLDER / f"{RANK}.signals").write_text(" ".join(map(str, received)))
    print(f"rank {RANK} ends with {code}", flush=True)
    leave_outcome(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
