"""Work spread over processes: a function and its jobs in, results in the order of the jobs out."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from traceback import format_exc
from typing import Any, TypeVar

import cv2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fcn_dist.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def default_workers() -> int:
    """As many processes as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(workers: int | None) -> int:
    """`workers`, or the default if None; raises UserError below 1."""
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; at least 1 is needed")
    return workers or default_workers()


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
    # Not ProcessPoolExecutor: an interrupt while it hands out jobs can leave its locks held, and it then hangs; and
    # its workers outlive a parent that is killed. Here there is neither a lock nor a thread, only one pipe a worker.
    # Not fork: the caller may have threads (torch, OpenCV), whose locks a fork would copy in whatever state.
    context = get_context("forkserver")
    context.set_forkserver_preload([function.__module__])  # imported once, not once a worker
    results: dict[int, Result] = {}
    waiting = iter(enumerate(jobs))
    busy: dict[Connection, int] = {}
    processes = []

    def hand_out(worker: Connection) -> None:
        number, job = next(waiting, (None, None))
        if number is not None:
            busy[worker] = number
            with _lives(workers):
                worker.send(job)
        else:
            worker.close()  # which ends it

    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(function, theirs), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
            hand_out(ours)
        while busy:
            for worker in wait(list(busy)):
                assert isinstance(worker, Connection)
                number = busy.pop(worker)
                results[number] = _result(worker, workers)
                done(number)
                hand_out(worker)
    finally:
        # Whether all is done or an error or interrupt has come: nothing of what they still do is wanted.
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
    return [results[number] for number in range(len(jobs))]


@contextmanager
def _lives(workers: int) -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise UserError(
            f"one of {workers} worker processes died before its work was done, most likely killed for want of "
            "memory; choose fewer --workers"
        ) from error


def _result(worker: Connection, workers: int) -> Any:
    with _lives(workers):
        succeeded, result = worker.recv()
    if not succeeded:
        raise result
    return result


def _work(function: Callable[[Job], Result], parent: Connection) -> None:
    # Ctrl-C reaches the whole terminal group; the parent alone answers it, and ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)  # the parallelism is in the processes
    # The pipe ends when there is no more to do, and when the parent has died.
    with suppress(EOFError, ConnectionError):
        while True:
            job: Job = parent.recv()
            try:
                answer: tuple[bool, object] = True, function(job)
            except Exception as error:
                error.add_note(f"in a worker process:\n{format_exc()}")
                answer = False, error
            parent.send(answer)


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
