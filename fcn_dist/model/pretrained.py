"""Weights in: a VGG state dict to the trunk of an FCN, with the preprocessing those weights expect.

With batch normalisation, its running statistics come along.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fcn_dist.errors import UserError
from fcn_dist.model.fcn import BATCH_NORM, FCN
from fcn_dist.model.preprocess import CAFFE, TORCHVISION, Preprocessing

CONVENTIONS = {"caffe": CAFFE, "torchvision": TORCHVISION}
# Where a classifier keeps what fc6 and fc7 are as convolutions, and the kernel each becomes: torchvision's, and that of
# the Caffe networks in torch's form, which begins with a layer that flattens.
CLASSIFIER = {
    "classifier.0": ("fc6", 7),
    "classifier.3": ("fc7", 1),
    "classifier.1": ("fc6", 7),
    "classifier.4": ("fc7", 1),
}
# Files of torch before 0.4.1 do not have the count of batches; nothing here depends on it.
COUNTER = "num_batches_tracked"
VARIANCE = "running_var"
CHECKPOINT_KEY = "model_state_dict"  # where pytorch-fcn's and other trainers keep a network beside its optimizer


def read_weights(path: Path, convention: str | None) -> tuple[dict[str, Tensor], Preprocessing]:
    """A VGG state dict in torchvision's key names, and its preprocessing.

    `convention` None takes what a safetensors file's metadata says. Raises UserError if the file cannot be read,
    is no state dict, or its convention is unknown. `.pth` files are read without unpickling code.
    """
    state, metadata = _read(path)
    convention = convention or metadata.get("preprocessing", "").partition(":")[0]
    if convention not in CONVENTIONS:
        raise UserError(
            f"weights {path} do not say which pixels they expect; one of {', '.join(CONVENTIONS)} is needed; set "
            "model.weights_convention"
        )
    return state, CONVENTIONS[convention]


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict by itself. Raises UserError if the file cannot be read, or is none."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickle(path), {})
    except OSError as error:
        raise UserError(f"weights {path} cannot be read ({error.strerror or error}); name another file") from error
    except Exception as error:  # both readers raise kinds of their own for damage
        raise UserError(f"weights {path} are no state dict ({error}); names with tensors are needed") from error


def load_weights(model: FCN, state: Mapping[str, Tensor], where: str) -> list[str]:
    """Copy convolutions and batch norms of `state` into the trunk, and its classifier into fc6 and fc7 where it fits.

    Returns the names of the modules that were filled. Raises UserError, naming `where`, if a tensor of the trunk is
    missing or has another shape, or only one of the two has batch normalisation.
    """
    own = model.state_dict()
    _check_normalisation(model, state, where)
    found = {}
    for name, tensor in own.items():
        if not name.startswith("features.") or (name.endswith(COUNTER) and name not in state):
            continue
        if name not in state or state[name].shape != tensor.shape:
            shape = tuple(state[name].shape) if name in state else "missing"
            raise UserError(
                f"weights {where}: {name} is {shape}; {tuple(tensor.shape)} is needed by backbone "
                f"{model.config.backbone} at width {model.config.width}; change model.backbone, model.width or "
                "model.weights"
            )
        if name.endswith(VARIANCE) and not (state[name] >= 0).all():
            raise UserError(
                f"weights {where}: {name} has values that are no variances; 0 or more is needed; get the file again"
            )
        found[name] = state[name]
    for source, (target, kernel) in CLASSIFIER.items():
        found |= _classifier_layer(state, source, target, kernel, own)
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
    return sorted({name.rpartition(".")[0] for name in found})


def _check_normalisation(model: FCN, state: Mapping[str, Tensor], where: str) -> None:
    """Other layers' weights may fit by chance, or be missing by a number that tells nobody what is wrong."""
    backbone = model.config.backbone
    has, needs = any(name.endswith(VARIANCE) for name in state), backbone.endswith(BATCH_NORM)
    if has != needs:
        other = backbone.removesuffix(BATCH_NORM) if needs else backbone + BATCH_NORM
        raise UserError(
            f"weights {where} have {'' if has else 'no '}running statistics of batch normalisation, and backbone "
            f"{backbone} has {'' if needs else 'no '}batch normalisation; both or neither is needed; set "
            f"model.backbone={other}, or change model.weights"
        )


def _classifier_layer(
    state: Mapping[str, Tensor], source: str, target: str, kernel: int, own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    weight, bias = state.get(f"{source}.weight"), state.get(f"{source}.bias")
    wanted = own[f"{target}.weight"]
    if weight is None or bias is None or weight.numel() != wanted.numel() or len(weight) != len(wanted):
        return {}
    return {
        f"{target}.weight": weight.reshape(weight.shape[0], -1, kernel, kernel),
        f"{target}.bias": bias,
    }


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def _read_pickle(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, dict):
        state = state.get(CHECKPOINT_KEY, state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("not a mapping of names to tensors")
    return state
