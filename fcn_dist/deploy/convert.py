"""A run's checkpoint in, one model file out: proven by the scores that the training engine itself recorded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fcn_dist
from fcn_dist.checkpoints.consolidate import AT_ONCE, Consolidated, Weights, consolidate
from fcn_dist.checkpoints.store import (
    PROBE_NAME,
    PROBE_SCORES,
    Checkpoint,
    Damage,
    of_checkpoint,
    open_described,
    telling_obstacles,
    while_removed,
)
from fcn_dist.checkpoints.trainingstate import SplitTensor
from fcn_dist.checkpoints.universal import is_universal
from fcn_dist.checkpoints.weights import Opened, Use, described, open_run
from fcn_dist.deploy.card import model_card
from fcn_dist.deploy.modelfile import check_new, write_model_file
from fcn_dist.deploy.proof import Agreement, compare, open_probe
from fcn_dist.errors import UserError, named
from fcn_dist.files import flushing, replacing
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.fcn import torch_dtype

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Conversion:
    """What was converted, and how it was checked."""

    path: Path
    checkpoint: Checkpoint
    weights: Weights
    passed_over: tuple[Damage, ...]  # newer checkpoints that are damaged
    rounded: tuple[str, ...]  # parameters that the checkpoint kept in 16 bits only
    left_out: tuple[str, ...]  # parameters of auxiliary heads, which are in training alone
    parameters: int
    agreement: Agreement


def convert(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    weights: Weights | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Conversion:
    """Write the model file of a run's newest whole checkpoint, or that of `step`, its weights stored as `dtype`.

    `run` may also be a universal checkpoint, as DeepSpeed's ds_to_universal made it of such a checkpoint, in whose own
    folder it lies: what was recorded there describes it and proves it.
    The weights are the averaged ones where the checkpoint has any, unless `weights` says which. Running statistics of
    batch normalisation, small and of a wide range, are stored in float32 in any case.
    The file appears only after it was read back and gave the scores that were recorded with these weights. Raises
    UserError if there is no whole checkpoint, if the scores differ, or if `out` exists and `overwrite` is false.
    """
    out, run = Path(out), Path(run)
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; one of {', '.join(DTYPES)} is needed")
    check_new(out, overwrite, run)
    written: list[_Finite] = []  # the last is of the checkpoint that was whole

    def write(checkpoint: Checkpoint, description: ModelDescription, found: Consolidated) -> None:
        _check_manifest(checkpoint, found)
        written.append(_Finite(found.split, torch_dtype(dtype)))
        write_model_file(temporary, written[-1], description, _source(checkpoint, found, dtype), dtype)

    def write_and_compare() -> tuple[Opened, Agreement]:
        opened = (_open_universal if is_universal(run) else open_run)(run, step, weights, write)
        written[-1].check(opened.checkpoint, dtype)
        with of_checkpoint(opened.checkpoint.dir):
            return opened, compare(temporary, opened.checkpoint, opened.found.weights, dtype)

    with replacing(out) as temporary, flushing(temporary):
        opened, agreement = while_removed(write_and_compare, run)
        checkpoint, found = opened.checkpoint, opened.found
        if not agreement.difference <= agreement.tolerance:  # not a number fails, too
            raise UserError(
                f"the model converted from {checkpoint.dir} does not give the scores that the training engine "
                f"recorded: they differ by {agreement.difference:.2g} of the largest score in {agreement.arithmetic}, "
                f"and at most {agreement.tolerance:.2g} is rounding; nothing was written; convert another --step"
            )
    return Conversion(
        out,
        checkpoint,
        found.weights,
        opened.passed_over,
        found.rounded,
        found.left_out,
        written[-1].numbers,
        agreement,
    )


def _open_universal(folder: Path, step: int | None, weights: Weights | None, use: Use) -> Opened:
    if step is not None:
        raise UserError(f"{folder} is the universal checkpoint of one step; leave --step out")
    checkpoint = open_described(folder.resolve().parent, PROBE_NAME)
    description = described(checkpoint)
    with torch.device("meta"):
        model = description.build()
    try:
        with telling_obstacles(folder), of_checkpoint(checkpoint.dir):
            found = consolidate(folder, model, weights, partial(use, checkpoint, description))
    except ValueError as error:
        raise UserError(f"{folder} is damaged: {error}; run ds_to_universal again, or copy it again") from error
    if weights is None:
        _check_averages(checkpoint, folder)
    return Opened(checkpoint, description, found, ())


def _check_averages(checkpoint: Checkpoint, folder: Path) -> None:
    """ds_to_universal knows but Adam's tensors: nobody is to take trained weights for averaged ones."""
    with open_probe(checkpoint) as probe:
        if PROBE_SCORES["averaged"] in probe.keys():  # noqa: SIM118 - no mapping
            raise UserError(
                f"the run of {folder} averaged its weights, and ds_to_universal left the averages out; give --weights "
                "trained to take the trained ones, or convert the run itself"
            )


def _check_manifest(checkpoint: Checkpoint, found: Consolidated) -> None:
    """What DeepSpeed's files say of themselves is what the manifest says of them."""
    state = checkpoint.state
    stated, saved = (state.zero_stage, state.world_size), (found.stage, found.world_size)
    if stated != saved:
        raise UserError(
            f"{checkpoint.dir} was saved with ZeRO stage {stated[0]} on {stated[1]} ranks by its manifest, and with "
            f"stage {saved[0]} on {saved[1]} by DeepSpeed's files; restore it from a copy, or convert another step"
        )


class _Finite(Mapping[str, Iterator[Tensor]]):
    """Tensors in runs, which are looked at as they are read, each once."""

    def __init__(self, state: Mapping[str, SplitTensor], dtype: torch.dtype) -> None:
        self.numbers = 0  # read
        self._state, self._dtype = state, dtype
        self._infinite: dict[str, None] = {}  # names, in order
        self._beyond: dict[str, None] = {}

    def __getitem__(self, name: str) -> Iterator[Tensor]:
        for run in self._state[name].runs(AT_ONCE):
            self.numbers += run.numel()
            if run.is_floating_point() and run.numel():
                extremes = torch.stack(run.aminmax())  # no number makes both none
                if not extremes.isfinite().all():
                    self._infinite[name] = None
                elif not extremes.to(self._dtype).isfinite().all():
                    self._beyond[name] = None
            yield run

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def check(self, checkpoint: Checkpoint, dtype: str) -> None:
        """Raise UserError unless everything was finite, and is in `dtype`."""
        if self._infinite:
            raise UserError(
                f"{checkpoint.dir} holds weights that are no finite numbers in {named(list(self._infinite))}: "
                "training had diverged; convert an earlier --step"
            )
        if self._beyond:
            raise UserError(
                f"weights of {named(list(self._beyond))} are beyond the range of {dtype}; choose bfloat16 or float32"
            )


def _source(checkpoint: Checkpoint, found: Consolidated, dtype: str) -> dict[str, Any]:
    state = checkpoint.state
    return {
        "run": checkpoint.dir.resolve().parents[1].name,
        "step": state.step,
        "weights": found.weights,
        "scores": state.scores,
        "dtype": dtype,
        "precision": state.precision,
        "zero_stage": found.stage,
        "world_size": found.world_size,
        "kept_in_16_bits": list(found.rounded),
        "index_sha256": state.index_sha256,
        "fcn_dist": fcn_dist.__version__,
        "deepspeed": found.deepspeed_version,
        "torch": torch.__version__,
        "card": model_card(checkpoint, found.weights),
    }
