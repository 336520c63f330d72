"""Work spread over processes: a function and its jobs in, results in the order of the jobs out."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from threading import Thread
from traceback import format_exc
from typing import Any, Generic, TypeVar

import cv2

from fcn_dist.errors import UserError
from fcn_dist.progress import count_progress

Job = TypeVar("Job")
Result = TypeVar("Result")
# `advance(n)` says that n more of a job's parts are done. In a worker it raises OSError once the parent is dead;
# it looks at that from time to time, and at once if n is 0.
Advance = Callable[[int], None]
_NEWS_EVERY = 0.1  # seconds; each message wakes the parent


def default_workers() -> int:
    """As many processes as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(workers: int | None) -> int:
    """`workers`, or the default if None; raises UserError below 1."""
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; at least 1 is needed")
    return workers or default_workers()


def start_early(function: Callable[..., Any]) -> None:
    """Let what workers are copied from load `function` while this process does other things."""
    # Not fork: the caller may have threads (torch, OpenCV), whose locks a fork would copy in whatever state.
    # The main script first: it may be what tells where our modules are.
    forkserver.set_forkserver_preload(["__main__", function.__module__])
    # An interrupt is for this process, which ends the others; theirs would be told in the middle of what they import.
    resource_tracker.ensure_running()  # which would take the block away again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def map_in_processes(
    function: Callable[[Job, Advance], Result],
    jobs: Sequence[Job],
    workers: int,
    title: str,
    sizes: Sequence[int] | None = None,
) -> list[Result]:
    """`[function(job, advance) for job in jobs]` over `workers` processes, this one among them.

    `sizes` are the jobs' parts of the progress bar. What a job has not advanced by its end is advanced then.

    The first exception of a job is raised. UserError if a worker dies. `function` must be importable by name.
    """
    sizes = [1] * len(jobs) if sizes is None else sizes
    with count_progress() as progress:
        task = progress.add_task(title, total=sum(sizes))
        crew = _Crew(function, jobs, list(sizes), lambda count: progress.advance(task, count))
        threads = cv2.getNumThreads()
        try:
            if workers > 1:
                cv2.setNumThreads(1)  # the parallelism is in the processes
            crew.work(min(workers, len(jobs)) - 1)
        finally:
            crew.dismiss()
            cv2.setNumThreads(threads)
    return [crew.results[number] for number in range(len(jobs))]


class _Crew(Generic[Job, Result]):
    """This process and its workers, at one list of jobs."""

    # Not ProcessPoolExecutor: an interrupt while it hands out jobs can leave its locks held, and it then hangs; and
    # its workers outlive a parent that is killed. Here is one pipe a worker. The start of a worker takes as long as
    # hundreds of images, so one thread waits for that and does nothing else, while this process is at work itself.

    def __init__(
        self, function: Callable[[Job, Advance], Result], jobs: Sequence[Job], left: list[int], show: Advance
    ) -> None:
        self.results: dict[int, Result] = {}
        self._function, self._jobs, self._left, self._show = function, jobs, left, show
        self._waiting = iter(range(len(jobs)))
        self._busy: dict[Connection, int] = {}
        self._processes: list[BaseProcess] = []
        self._started: SimpleQueue[Connection | BaseException] = SimpleQueue()
        self._starter: Thread | None = None
        self._to_start = 0
        self._dismissed = False

    def work(self, helpers: int) -> None:
        """Do all jobs, with so many processes more."""
        if helpers > 0:
            self._to_start = helpers
            self._starter = Thread(target=self._start, args=(helpers,), daemon=True)
            self._starter.start()
        for number in self._waiting:
            self.results[number] = self._function(self._jobs[number], lambda n, job=number: self._own(job, n))  # type: ignore[misc]
            self._done(number)
        while self._busy:
            self._listen(None)

    def dismiss(self) -> None:
        """End the workers, whether all is done or an error or interrupt has come: nothing they still do is wanted."""
        self._dismissed = True
        if self._starter and self._starter.is_alive():  # an interrupt may have come before it was
            self._starter.join()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def _start(self, count: int) -> None:
        try:
            start_early(self._function)
            context = get_context("forkserver")
            for _ in range(count):
                if self._dismissed:
                    return
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(self._function, theirs), daemon=True)
                process.start()
                self._processes.append(process)
                theirs.close()
                self._started.put(ours)
        except BaseException as error:
            self._started.put(error)  # raised where the work is

    def _own(self, number: int, count: int) -> None:
        self._advance(number, count)
        self._listen(0)

    def _advance(self, number: int, count: int) -> None:
        self._left[number] -= count
        self._show(count)

    def _done(self, number: int) -> None:
        self._advance(number, self._left[number])

    def _listen(self, timeout: float | None) -> None:
        """Take what workers have to say, and give work to those that have none."""
        while self._to_start and not self._started.empty():
            started = self._started.get()
            if isinstance(started, BaseException):
                raise started
            self._to_start -= 1
            self._hand_out(started)
        for worker in wait(list(self._busy), timeout) if self._busy else ():
            assert isinstance(worker, Connection)
            news = self._receive(worker)
            if isinstance(news, int):
                self._advance(self._busy[worker], news)
                continue
            number = self._busy.pop(worker)
            (self.results[number],) = news
            self._done(number)
            self._hand_out(worker)

    def _hand_out(self, worker: Connection) -> None:
        number = next(self._waiting, None)
        if number is None:
            worker.close()  # which ends it
            return
        self._busy[worker] = number
        with _lives():
            worker.send(self._jobs[number])

    def _receive(self, worker: Connection) -> Any:
        """How far a job has come, or a tuple with its result; raises what the job has raised."""
        with _lives():
            news = worker.recv()
        if isinstance(news, BaseException):
            raise news
        return news


@contextmanager
def _lives() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise UserError(
            "a worker process died before its work was done, most likely killed for want of memory; choose fewer "
            "--workers"
        ) from error


def _work(function: Callable[[Job, Advance], Result], parent: Connection) -> None:
    # Ctrl-C reaches the whole terminal group; the parent alone answers it, and ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    # The pipe ends when there is no more to do, and when the parent has died.
    with suppress(EOFError, ConnectionError):
        while True:
            job: Job = parent.recv()
            try:
                news: object = (function(job, _sender(parent)),)
            except Exception as error:
                error.add_note(f"in a worker process:\n{format_exc()}")
                news = error
            parent.send(news)


def _sender(parent: Connection) -> Advance:
    gathered, told = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal gathered, told
        gathered += count
        now = time.monotonic()
        if not count or now - told > _NEWS_EVERY:
            parent.send(gathered)
            gathered, told = 0, now

    return advance
