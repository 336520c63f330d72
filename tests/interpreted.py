"""Triton's kernels on a GPU, or without one: in Triton's interpreter, in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, for its own functions, and when a kernel is decorated; and once it
has interpreted one, it no longer compiles any. A process does one or the other.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor


class Run(Protocol):
    """Calls a function by name, MODULE.NAME or a name of `kernels`, with tensors that lie on the CPU."""

    def __call__(self, function: str, *arguments: Any) -> Any: ...


@contextmanager
def kernels_on(where: str) -> Iterator[Run]:
    """`where` is "interpreter", or "cuda"."""
    if where == "interpreter":
        with interpreter() as interpreted:
            yield interpreted
    else:
        yield on_gpu


def on_gpu(function: str, *arguments: Any) -> Any:
    result = call(function, *(a.cuda() if isinstance(a, Tensor) else a for a in arguments))
    if isinstance(result, tuple):
        return tuple(part if part is None else part.cpu() for part in result)
    return result.cpu()


@contextmanager
def interpreter() -> Iterator[Run]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_interpret) as process:
        yield lambda function, *arguments: process.submit(call, function, *arguments).result(timeout=120)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def call(function: str, *arguments: Any) -> Any:
    module, _, name = function.rpartition(".")
    return getattr(import_module(f"fcn_dist.model.{module or 'kernels'}"), name)(*arguments)
