"""The recipe: one tree of frozen dataclasses, never changed once it is read (recipefile.py).

The recipe owns data, model, schedule and cadences. Batch cutting, precision, ZeRO stage, optimizer and clipping
belong to the DeepSpeed configuration (see training/deepspeed_config.py).
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fcn_dist.errors import UserError

BACKBONES = ("vgg16", "vgg16_bn", "vgg19", "vgg19_bn")


@dataclass(frozen=True)
class DataConfig:
    """What a training sample is."""

    crop: tuple[int, int] = (256, 256)  # height, width in pixels
    scale: tuple[float, float] | None = (0.5, 2.0)  # resize factor, drawn log-uniformly; None: squash all into the crop
    interpolation: Literal["bilinear", "nearest"] = "bilinear"  # of images; bilinear is averaging where it halves
    flip: float = 0.5  # probability of mirroring left to right
    class_limit: float = 1.0  # of a crop's labelled pixels, that one class may have; else it is drawn again, ten times
    jitter: float = 0.0  # brightness, contrast and saturation are scaled by up to 1 +- this
    score_other: bool = False  # label 0 as an ordinary class, as the TensorFlow FCN had it
    workers: int = 2  # loader processes a rank; 0 loads in the training process
    window: int | None = None  # shards that are shuffled together, over all lanes; None: the whole set
    lanes: int = 1  # runs of shards read side by side; with as many as nodes, each node reads its own
    max_bad_samples: int = 0  # damaged samples that may be replaced by others before the run ends
    cache_dir: str | None = None  # of remote shards, on each node; None: see data/remote/cache.py
    cache_limit: str = "100GB"  # of all remote shards kept in it
    read_ahead: int = 4  # remote shards each loader process fetches before they are needed

    def __post_init__(self) -> None:
        _check(min(self.crop) >= 1, "data.crop", self.crop, "two sizes of at least 1 pixel")
        low, high = self.scale or (1.0, 1.0)
        _check(0 < low <= high < math.inf, "data.scale", self.scale, "two positive factors, low to high, or null")
        _check(0 <= self.flip <= 1, "data.flip", self.flip, "a probability")
        _check(0 < self.class_limit <= 1, "data.class_limit", self.class_limit, "a share above 0, up to 1")
        _check(0 <= self.jitter < 1, "data.jitter", self.jitter, "a number in [0, 1)")
        _check(self.workers >= 0, "data.workers", self.workers, "0 or more processes")
        _check(self.window is None or self.window >= 1, "data.window", self.window, "1 or more shards, or null")
        _check(self.lanes >= 1, "data.lanes", self.lanes, "1 or more")
        _check(self.max_bad_samples >= 0, "data.max_bad_samples", self.max_bad_samples, "0 or more samples")
        _check(self.read_ahead >= 0, "data.read_ahead", self.read_ahead, "0 or more shards")


@dataclass(frozen=True)
class ModelConfig:
    """The network and the weights it starts from."""

    variant: Literal["fcn8s", "fcn16s", "fcn32s"] = "fcn8s"
    # "reference": padding by 100 pixels and crops as in the Caffe release, for its weights; it computes more.
    geometry: Literal["same", "reference"] = "same"
    # With batch normalisation (_bn) each micro-batch is normalised by itself, so the update depends on how the global
    # batch is cut into micro-batches, and other ranks do not continue a run exactly. Without it they do.
    backbone: Literal["vgg16", "vgg16_bn", "vgg19", "vgg19_bn"] = "vgg16"
    width: float = 1.0  # factor on every channel count but the outputs
    head_width: int | None = None  # channels of fc6 and fc7; None: 4096 times width
    dropout: float = 0.5  # after fc6 and fc7
    pooling: Literal["max", "average"] = "max"  # "average": after stages 1 to 4, as the TensorFlow FCN had it
    at_once: bool = False  # scale pool4 by 0.01 and pool3 by 0.0001, the at-once form's conditioning
    frozen_stages: int = 0  # first stages of the backbone that keep weights and statistics they start with
    weights: str | None = None  # VGG weights, .safetensors or .pth
    weights_convention: Literal["caffe", "torchvision"] | None = None  # None: as the file's metadata says
    weights_licence: str | None = None  # under which they are given away, for the model card; None: not known

    def __post_init__(self) -> None:
        _check(0 < self.width <= 4, "model.width", self.width, "a factor in (0, 4]")
        _check(self.head_width is None or self.head_width >= 1, "model.head_width", self.head_width, "1 or more")
        _check(0 <= self.dropout < 1, "model.dropout", self.dropout, "a probability below 1")
        _check(0 <= self.frozen_stages <= 5, "model.frozen_stages", self.frozen_stages, "0 to 5 stages")


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, and how fast."""

    steps: int | None = None  # global batches; one of steps and epochs
    epochs: float | None = None
    learning_rate: float | None = None  # peak; None: as the DeepSpeed configuration's optimizer states it
    kind: Literal["constant", "poly", "cosine"] = "poly"
    power: float = 0.9  # of the poly schedule
    warmup_steps: int = 0  # linear from 0 to the peak
    final_fraction: float = 0.0  # of the peak, where poly and cosine end, one step after the last
    head_multiplier: float = 1.0  # learning rate of the layers that pretrained weights do not provide
    bias_multiplier: float = 1.0  # learning rate of biases, and scales of batch norm (the reference: 2)
    decay_biases: bool = False  # whether the optimizer's weight decay also acts on biases and those scales

    def __post_init__(self) -> None:
        _check(
            (self.steps is None) != (self.epochs is None),
            "schedule.steps and schedule.epochs",
            (self.steps, self.epochs),
            "exactly one of the two",
        )
        _check(self.steps is None or self.steps >= 1, "schedule.steps", self.steps, "1 or more")
        _check(self.epochs is None or 0 < self.epochs < math.inf, "schedule.epochs", self.epochs, "a positive number")
        rate = self.learning_rate
        _check(rate is None or 0 < rate < math.inf, "schedule.learning_rate", rate, "a positive number")
        _check(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "0 or more")
        for key in ("power", "head_multiplier", "bias_multiplier"):
            value = getattr(self, key)
            _check(0 <= value < math.inf, f"schedule.{key}", value, "0 or a positive number")
        _check(0 <= self.final_fraction <= 1, "schedule.final_fraction", self.final_fraction, "within [0, 1]")


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation as a whole."""

    global_batch: int | None = None  # images a step, over all ranks; None: as the DeepSpeed configuration gives it
    seed: int = 0
    # "mean" over the labelled pixels of the global batch; "sum" over those of an image, and the mean over images: at a
    # batch of 1 the reference's, whose learning rates are some 100,000 times smaller.
    loss: Literal["mean", "sum"] = "mean"
    max_skipped_steps: int = 10  # that may not be finite, in the whole run, before it ends
    watchdog: float = 600.0  # seconds without progress on any rank that end the job; 0: never
    # Of the losses of two more score layers, on pool3 and pool4, which are in training alone; 0: there are none.
    auxiliary: float = 0.0
    recompute_stages: int = 0  # first stages of the network (5 of the trunk, 6: fc6 and fc7) computed again in backward
    recompute_images: int = 8  # at once, in stages 1 to 3; 0: the whole micro-batch
    compile: bool = False  # layers between poolings by torch.compile
    # Decay of an exponential moving average of the weights, such as 0.999, which evaluation scores; None: no average.
    ema: float | None = None

    def __post_init__(self) -> None:
        _check(
            self.watchdog == 0 or 5 <= self.watchdog < math.inf, "train.watchdog", self.watchdog, "5 s or more, or 0"
        )
        _check(
            self.global_batch is None or self.global_batch >= 1,
            "train.global_batch",
            self.global_batch,
            ">= 1",
        )
        _check(0 <= self.auxiliary < math.inf, "train.auxiliary", self.auxiliary, "0 or a positive number")
        _check(0 <= self.recompute_stages <= 6, "train.recompute_stages", self.recompute_stages, "0 to 6 stages")
        _check(self.recompute_images >= 0, "train.recompute_images", self.recompute_images, "0 or more images")
        _check(self.max_skipped_steps >= 0, "train.max_skipped_steps", self.max_skipped_steps, "0 or more steps")
        _check(self.ema is None or 0 < self.ema < 1, "train.ema", self.ema, "a decay within (0, 1), or null")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation during training."""

    every: int = 0  # steps; 0: only after the last step
    at_end: bool = True
    split: str = "validation"
    scenes: int = 9  # a third each of the best, middling and worst, that are kept as pictures; 0: none

    def __post_init__(self) -> None:
        _check(self.every >= 0, "evaluate.every", self.every, "0 or more steps")
        _check(self.scenes >= 0, "evaluate.scenes", self.scenes, "0 or more scenes")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints during training; one is always written after the last step."""

    every: int = 0  # steps; 0: only after the last step
    keep: int = 3  # newest checkpoints kept
    keep_every: int = 0  # steps; those of a multiple of it are kept for good; 0: none for that
    keep_best: int = 0  # best-scoring checkpoints kept besides; evaluate.every must meet checkpoint.every
    best_by: Literal["mean_iou", "pixel_accuracy", "score"] = "mean_iou"  # of the benchmark's own scores
    background: bool = True  # write while training goes on; needs host memory for a second copy of the state
    max_failures: int = 3  # saves in a row that may fail, as on a full disk, before the run ends

    def __post_init__(self) -> None:
        _check(self.every >= 0, "checkpoint.every", self.every, "0 or more steps")
        _check(self.keep >= 1, "checkpoint.keep", self.keep, "1 or more")
        _check(self.keep_every >= 0, "checkpoint.keep_every", self.keep_every, "0 or more steps")
        _check(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "0 or more checkpoints")
        _check(self.max_failures >= 0, "checkpoint.max_failures", self.max_failures, "0 or more saves")


@dataclass(frozen=True)
class LogConfig:
    """What is written to metrics.jsonl and shown."""

    every: int = 10  # steps
    layers: int = 100  # steps between looks at the gradient and weights of each layer; 0: none
    tensorboard: bool = False  # the same for TensorBoard, in RUN/tensorboard
    wandb: bool = False  # the same for Weights & Biases, offline, in RUN/wandb

    def __post_init__(self) -> None:
        _check(self.every >= 1, "log.every", self.every, "1 or more steps")
        _check(self.layers >= 0, "log.layers", self.layers, "0 or more steps")


@dataclass(frozen=True)
class Recipe:
    """Everything about a run that the DeepSpeed configuration does not own."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(steps=1000))
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def as_dict(self) -> dict[str, Any]:
        """JSON form, every value resolved."""
        return asdict(self)


def _check(holds: bool, key: str, found: Any, needed: str) -> None:
    if not holds:
        raise UserError(f"{key} is {found}; needed: {needed}; change it in the recipe or with --set")
