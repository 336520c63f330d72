"""A state dict of pytorch-fcn in, a model file out: proven by the scores of its own layers, one after the other.

Shapes: C outputs, H x W pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import fcn_dist
from fcn_dist.config import ModelConfig
from fcn_dist.deploy.modelfile import check_new, read_model_file, write_model_file
from fcn_dist.errors import UserError, named
from fcn_dist.files import replacing
from fcn_dist.model import reference
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.fcn import HEAD_CHANNELS, STAGE_CHANNELS, STAGE_CONVOLUTIONS, torch_dtype
from fcn_dist.model.preprocess import Preprocessing
from fcn_dist.model.pretrained import read_state
from fcn_dist.model.score import AT_ONCE_SCALES
from fcn_dist.palette import palette

# What its data sets subtract, blue first.
PIXELS = Preprocessing("BGR", (104.00698793, 116.66876762, 122.67891434), (1.0, 1.0, 1.0))
CONVOLUTIONS = STAGE_CONVOLUTIONS["vgg16"]
# Its transposed convolutions by variant: name and stride, in the order they are computed.
DECONVOLUTIONS = {
    "fcn8s": (("upscore2", 2), ("upscore_pool4", 2), ("upscore8", 8)),
    "fcn16s": (("upscore2", 2), ("upscore16", 16)),
    "fcn32s": (("upscore", 32),),
}
SKIPS = {"fcn8s": (4, 3), "fcn16s": (4,), "fcn32s": ()}
PROBE_SIZE = (37, 50)  # pixels; any size shows all that there is to see
# Largest difference of any score, as a share of the largest: the order of additions in some twenty layers, and what
# weights lose that are stored in 16 bits. Seen in float32: 1e-6.
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}


@dataclass(frozen=True)
class Converted:
    """What was converted, and how it was checked."""

    path: Path
    description: ModelDescription
    parameters: int
    scores: int
    difference: float  # largest, as a share of the largest score
    tolerance: float


def convert(
    source: Path,
    out: Path,
    classes: Sequence[str],
    *,
    at_once: bool = False,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Converted:
    """Write the model file of a pytorch-fcn state dict: FCN32s, FCN16s, FCN8s or, with `at_once`, FCN8sAtOnce.

    `classes` name labels 1..N; with one name fewer than outputs, the first output is label 0, "other". The file appears
    only after it was read back and gave the scores of the state dict's own layers for an image. Raises UserError if
    `source` is no such state dict, its transposed convolutions are not the frozen bilinear ones, the classes do not fit
    its outputs, or `out` exists and `overwrite` is false.
    """
    check_new(out, overwrite, Path(source))
    state = {name: tensor.float() for name, tensor in read_state(source).items()}
    variant = _variant(state, source)
    description = _description(state, variant, at_once, classes, source)
    renamed = _renamed(state, variant, source)
    _check_shapes(renamed, description, source)
    stored = {name: tensor.to(torch_dtype(dtype)) for name, tensor in renamed.items()}
    origin = {"converted_from": f"pytorch-fcn, {source.name}", "dtype": dtype, "fcn_dist": fcn_dist.__version__}
    with replacing(out) as partial:
        write_model_file(partial, stored, description, origin)
        scores, difference = _compare(partial, state, variant, at_once)
        if not difference <= TOLERANCES[dtype]:  # not a number fails, too
            raise UserError(
                f"the model converted from {source} does not give the scores of its layers: they differ by "
                f"{difference:.2g} of the largest score, and at most {TOLERANCES[dtype]:.2g} is rounding; nothing was "
                "written; is it a network of pytorch-fcn as published?"
            )
    parameters = sum(tensor.numel() for tensor in stored.values())
    return Converted(out, description, parameters, scores, difference, TOLERANCES[dtype])


def _variant(state: Mapping[str, Tensor], source: Path) -> str:
    """Told by the last transposed convolution."""
    for variant, layers in DECONVOLUTIONS.items():
        if f"{layers[-1][0]}.weight" in state:
            return variant
    raise UserError(
        f"{source} is no state dict of pytorch-fcn: it has none of upscore8.weight, upscore16.weight and "
        f"upscore.weight, but {named(list(state))}; give the file that its trainer saves, its model_state_dict alone"
    )


def layers(variant: str) -> Iterator[tuple[str, str]]:
    """Its name and ours, of each layer with weight and bias."""
    index = 0
    for stage, count in enumerate(CONVOLUTIONS, 1):
        for number in range(1, count + 1):
            yield f"conv{stage}_{number}", f"features.{index}"
            index += 2  # its ReLU
        index += 1  # pooling
    skips = [f"score_pool{stage}" for stage in SKIPS[variant]]
    yield from ((name, name) for name in ("fc6", "fc7", "score_fr", *skips))


def _renamed(state: Mapping[str, Tensor], variant: str, source: Path) -> dict[str, Tensor]:
    """The tensors under our names; the transposed convolutions must be what they are here without being stored."""
    theirs = {f"{name}.{kind}": f"{own}.{kind}" for name, own in layers(variant) for kind in ("weight", "bias")}
    upscores = {f"{name}.weight": stride for name, stride in DECONVOLUTIONS[variant]}
    problems = [f"{name} is missing" for name in (*theirs, *upscores) if name not in state]
    problems += [f"{name} is not part of it" for name in state if name not in theirs and name not in upscores]
    if problems:
        raise UserError(f"{source} is no {variant} of pytorch-fcn: {named(problems)}; give a whole state dict of it")
    for name, stride in upscores.items():
        outputs = state[name].shape[0]
        wanted = torch.zeros(outputs, outputs, 2 * stride, 2 * stride)
        wanted[range(outputs), range(outputs)] = reference.bilinear(stride)
        if state[name].shape != wanted.shape or not torch.allclose(state[name], wanted, rtol=0, atol=1e-5):
            raise UserError(
                f"{source}: {name} is not the bilinear interpolation that the published network keeps frozen, so it "
                "was trained as well; only frozen ones can be converted"
            )
    return {own: state[name] for name, own in theirs.items()}


def _description(
    state: Mapping[str, Tensor], variant: str, at_once: bool, classes: Sequence[str], source: Path
) -> ModelDescription:
    if at_once and variant != "fcn8s":
        raise UserError(f"{source} is a {variant}, and the at-once form is one of fcn8s; leave --at-once out")
    sizes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        channels, head, outputs = (sizes[f"{name}.weight"][0] for name in ("conv5_3", "fc6", "score_fr"))
    except (KeyError, IndexError) as error:
        raise UserError(f"{source} has no {error}; give a whole state dict of pytorch-fcn") from error
    if len(classes) not in (outputs, outputs - 1):
        raise UserError(
            f"{source} has {outputs} outputs, and {len(classes)} classes are named; {outputs} names are needed, or "
            f"{outputs - 1} if the first output is label 0, such as the background of PASCAL VOC; correct --classes"
        )
    config = ModelConfig(
        variant=variant,  # type: ignore[arg-type]
        backbone="vgg16",
        geometry="reference",
        width=channels / STAGE_CHANNELS[-1],
        head_width=None if head == HEAD_CHANNELS else head,
        at_once=at_once,
    )
    return ModelDescription(config, PIXELS, tuple(classes), palette(len(classes)), len(classes) == outputs - 1)


def _check_shapes(renamed: Mapping[str, Tensor], description: ModelDescription, source: Path) -> None:
    with torch.device("meta"):
        needed = description.build().state_dict()
    wrong = [
        f"{name} is {tuple(renamed[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in needed.items()
        if renamed[name].shape != tensor.shape
    ]
    if wrong:
        raise UserError(f"{source} is no network of pytorch-fcn on VGG16: {named(wrong)}; give a state dict of one")


def _compare(path: Path, state: Mapping[str, Tensor], variant: str, at_once: bool) -> tuple[int, float]:
    """How many scores, and the largest difference as a share of the largest, of the file read as a user would."""
    pixels = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, *PROBE_SIZE, 3), generator=pixels, dtype=torch.uint8)
    model, _ = read_model_file(path)
    with torch.inference_mode():
        found, wanted = model(image), by_layers(state, image, variant, at_once)
    largest = float(wanted.abs().max())
    return found.numel(), float((found - wanted).abs().max()) / (largest or 1.0)


def by_layers(state: Mapping[str, Tensor], image_1HW3: Tensor, variant: str, at_once: bool) -> Tensor:
    """Scores (1, C, H, W) of an RGB image: its layers one after the other, transposed convolutions as stored."""

    def layer(name: str, x: Tensor, padding: int = 0) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    size = (image_1HW3.shape[1], image_1HW3.shape[2])
    x = (image_1HW3.flip(-1).float() - torch.tensor(PIXELS.mean)).permute(0, 3, 1, 2)
    pooled: dict[int, Tensor] = {}
    for stage, count in enumerate(CONVOLUTIONS, 1):
        for number in range(1, count + 1):
            padding = reference.PADDING if (stage, number) == (1, 1) else 1
            x = layer(f"conv{stage}_{number}", x, padding).relu()
        x = pooled[stage] = F.max_pool2d(x, 2, 2, ceil_mode=True)
    scores = layer("score_fr", layer("fc7", layer("fc6", x).relu()).relu())
    *inner, (last, stride) = DECONVOLUTIONS[variant]
    scales = AT_ONCE_SCALES if at_once else dict.fromkeys(reference.SKIP_CROPS, 1.0)
    for (name, _), stage in zip(inner, SKIPS[variant], strict=True):
        scores = F.conv_transpose2d(scores, state[f"{name}.weight"], stride=2)
        skip = layer(f"score_pool{stage}", pooled[stage] * scales[stage])
        scores = scores + _cropped(skip, reference.SKIP_CROPS[stage], (scores.shape[2], scores.shape[3]))
    scores = F.conv_transpose2d(scores, state[f"{last}.weight"], stride=stride)
    return _cropped(scores, reference.SCORE_CROPS[stride], size)


def _cropped(larger: Tensor, offset: int, size: tuple[int, int]) -> Tensor:
    return larger[:, :, offset : offset + size[0], offset : offset + size[1]]
