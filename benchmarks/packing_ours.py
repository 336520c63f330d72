"""A scenes folder in; its pairs packed by this package out: all that the benchmark of packing asks of it."""

import cProfile
import pstats
import subprocess
import sys
import time
from pathlib import Path

from fcn_dist import pack

SPLITS = ("training",)
SHORT_SIDE = 256
COSTLIEST = 12  # functions that the profile names


def packed(scenes: str, out: str, workers: int, shrink: bool = False) -> dict[str, float]:
    """Seconds of `pack`, the start of its processes included."""
    started = time.perf_counter()
    pack(scenes, out, SPLITS, workers=workers, short_side=SHORT_SIDE if shrink else None)
    return {"seconds": time.perf_counter() - started}


def command(scenes: str, out: str, workers: int) -> dict[str, float]:
    """Seconds of the whole command: interpreter, imports, packing, summary."""
    started = time.perf_counter()
    words = ["create", scenes, out, "--split", *SPLITS, "--workers", str(workers)]
    subprocess.run([sys.executable, "-m", "fcn_dist", *words], check=True, capture_output=True)
    return {"seconds": time.perf_counter() - started}


def profiled(scenes: str, out: str) -> dict[str, float]:
    """Seconds that the costliest functions themselves take in one process; the profiler's own time comes on top."""
    profile = cProfile.Profile()
    with profile:
        pack(scenes, out, SPLITS, workers=1)
    stats = pstats.Stats(profile).get_stats_profile().func_profiles
    own = sorted(((one.tottime, name, one.file_name) for name, one in stats.items()), reverse=True)
    named = {f"{name} ({Path(file).name})" if file != "~" else name: seconds for seconds, name, file in own[:COSTLIEST]}
    return {"seconds": sum(seconds for seconds, *_ in own), **named}
