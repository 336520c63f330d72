"""Work spread over processes: a function and its jobs in, results in the order of the jobs out."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from multiprocessing.synchronize import Event
from typing import TypeVar

import cv2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fcn_dist.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

_stop: Event | None = None  # in a worker process: set when the others' work is no longer wanted


def default_workers() -> int:
    """As many processes as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(workers: int | None) -> int:
    """`workers`, or the default if None; raises UserError below 1."""
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; at least 1 is needed")
    return workers or default_workers()


def stop_if_asked() -> None:
    """Called between samples by long jobs: ends the job when another has failed or the user has had enough."""
    if _stop is not None and _stop.is_set():
        raise InterruptedError


def map_in_processes(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    title: str,
    sizes: Sequence[int] | None = None,
) -> list[Result]:
    """`[function(job) for job in jobs]` over `workers` processes; `sizes` are the jobs' parts of the progress bar.

    The first exception of a job is raised. UserError if a worker dies. `function` must be importable by name.
    """
    sizes = [1] * len(jobs) if sizes is None else sizes
    with _progress() as progress:
        task = progress.add_task(title, total=sum(sizes))
        if workers == 1 or len(jobs) <= 1:
            results = []
            for job, size in zip(jobs, sizes, strict=True):
                results.append(function(job))
                progress.advance(task, size)
            return results
        return _map_in_pool(function, jobs, min(workers, len(jobs)), lambda i: progress.advance(task, sizes[i]))


def _map_in_pool(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, done: Callable[[int], None]
) -> list[Result]:
    # Not fork: the caller may have threads (torch, OpenCV), whose locks a fork would copy in whatever state.
    context = get_context("forkserver" if sys.platform != "win32" else "spawn")
    context.set_forkserver_preload([function.__module__])  # imported once, not once a worker
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (stop,)) as pool:
        futures: dict[Future[Result], int] = {pool.submit(function, job): i for i, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                future.result()
                done(futures[future])
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {workers} worker processes died before its work was done, most likely killed for want of "
                "memory; choose fewer --workers"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        return [future.result() for future in futures]


def _start_worker(stop: Event) -> None:
    global _stop
    _stop = stop
    # Ctrl-C reaches the whole terminal group; the parent alone answers it, and asks us to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)  # the parallelism is in the processes
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that was killed cannot ask; without this its workers would wait for jobs for ever.
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
