"""Ours in training: the network, DeepSpeed engine, loss and checks of `launch/train.py`, on one rank under ZeRO-1.

Nothing of a step is left out but the loader and the writing of figures.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from training_steps import Scenes, largest, measure

from fcn_dist.config import ModelConfig, Recipe, ScheduleConfig, TrainConfig
from fcn_dist.data.loader import Batch
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.keys import key64
from fcn_dist.model import relupool
from fcn_dist.model.fcn import FCN
from fcn_dist.model.flops import training_flops
from fcn_dist.model.loss import summed_cross_entropy
from fcn_dist.training.augment import to_device
from fcn_dist.training.collective import start_ranks
from fcn_dist.training.compiling import compile_network
from fcn_dist.training.deepspeed_config import read_deepspeed_config, resolve
from fcn_dist.training.display import TrainingDisplay
from fcn_dist.training.engine import backward, build_engine, set_learning_rate
from fcn_dist.training.finite import StepCheck
from fcn_dist.training.job import Job
from fcn_dist.training.layers import LayerReport
from fcn_dist.training.runfolder import Journal
from fcn_dist.training.schedule import parameter_groups

ZERO = Path(__file__).resolve().parents[1] / "launch" / "zero"
LEARNING_RATE = 1e-4


class OurTrainer:
    """Ours ready to train; its weights are random."""

    def __init__(
        self,
        outputs: int,
        device: torch.device,
        precision: str,
        recompute_stages: int = 0,
        model: ModelConfig | None = None,
        torch_pooling: bool = False,
        compiled: bool = False,
        looks: bool = False,
    ) -> None:
        if torch_pooling:  # what is done without Triton's kernels
            vars(relupool)["uses_kernels"] = lambda tensor: False
        rank = start_ranks()
        recipe = Recipe(
            model=model or ModelConfig(),
            schedule=ScheduleConfig(steps=1, learning_rate=LEARNING_RATE),
            train=TrainConfig(global_batch=1),
        )
        config = resolve(read_deepspeed_config(ZERO / f"zero1_{precision}.json"), recipe, rank.world_size)
        with device:  # random numbers for 135 million weights are made where they are needed
            self.model = FCN(outputs, recipe.model)
        self.model.recompute_stages, self.model.recompute_images = recompute_stages, recipe.train.recompute_images
        if compiled:
            compile_network(self.model, config.zero_stage, device)
        groups = parameter_groups(self.model, recipe.schedule)
        self.engine = build_engine(self.model, config, groups)
        self.engine.train()
        # The stream and the set are asked for the names of samples, after a step that was not finite.
        stream, shard_set = cast(SampleStream, None), cast(ShardSet, None)
        self.job = Job(
            recipe,
            config,
            groups,
            stream,
            self.model.stride,
            self.model.offset,
            rank,
            device,
            recipe.schedule.steps or 1,
        )
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        progress = TrainingDisplay(1, 0, shown=False)
        journal = Journal(folder, 0)
        self.check = StepCheck(self.job, self.engine, shard_set, folder, progress, journal)
        self.layers = LayerReport(self.engine, int(looks), journal)

    def compile(self) -> None:
        """Not asked for: ours is compiled when it is built, as a recipe has it."""
        raise AssertionError("a trainer of ours is not compiled afterwards")

    def prepare(self, scenes: Scenes) -> Batch:
        """What the loader hands over."""
        labelled = int((scenes.targets != scenes.ignored).sum())
        images, targets = scenes.pinned(scenes.images), scenes.pinned(scenes.targets)
        return Batch(images, targets, labelled, tuple(range(len(images))))

    def step(self, inputs: Batch) -> Tensor:
        """One step, as `train_steps` takes it; returns the loss."""
        recipe = self.job.recipe
        set_learning_rate(self.engine, self.job.groups, LEARNING_RATE)
        images, targets = to_device(inputs, recipe.data, recipe.train.seed, self.job.device)
        dropout_keys = [key64(recipe.train.seed, position) for position in inputs.positions]
        loss = summed_cross_entropy(
            self.engine(images, coarse=True, dropout_keys=dropout_keys), targets, self.job.stride
        )
        backward(self.engine, self.check.watch(loss) * (1 / inputs.labelled))
        if self.layers.due(1):
            self.layers.look()
            self.layers.write(1)
        self.engine.step()
        if not self.check.finite(1, [inputs]):
            raise ValueError("our loss is not finite")
        return loss.detach() / inputs.labelled

    def flops(self, size: tuple[int, int]) -> int:
        """Of a step, for one image."""
        return training_flops(self.model, size)

    def close(self) -> None:
        """Give memory back."""
        self.engine.destroy()
        self._folder.cleanup()
        del self.engine, self.model, self.job, self.check, self.layers


def train(
    precision: str,
    recompute_stages: int = 0,
    torch_pooling: bool = False,
    compiled: bool = False,
    looks: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Figures of training steps; `options` are those of `measure`."""
    how: dict[str, Any] = {"recompute_stages": recompute_stages, "torch_pooling": torch_pooling}
    how |= {"compiled": compiled, "looks": looks}
    return measure(partial(OurTrainer, precision=precision, **how), **options)


def train_largest(precision: str, recompute_stages: int = 0, **options: Any) -> dict[str, Any]:
    """The largest batches; `options` are those of `largest`."""
    build = partial(OurTrainer, precision=precision, recompute_stages=recompute_stages)
    return largest(build, compiled=False, **options)
