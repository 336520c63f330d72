"""The model file: one .safetensors with everything inference needs; reading it never unpickles.

Tensors bear the network's own names. Metadata key `fcn_dist` holds JSON: format_version, model (ModelDescription) and
source, which says where the weights came from and is for people. docs/modelfile.md has all of it, byte for byte.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fcn_dist.errors import UserError, named
from fcn_dist.files import check_place
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.fcn import FCN, torch_dtype

FORMAT_VERSION = 1
METADATA_KEY = "fcn_dist"
GRAPHS = {".onnx": "onnx", ".pt2": "torch-export"}  # what else convert.py writes of a run, by how its name ends
MODELS = {".safetensors", *GRAPHS}
CHECKPOINTS, RECORD = "checkpoints", "run.json"  # of a run
# As the format names what is stored here.
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
NEEDED = "a model file written by launch/convert.py is needed"


class Form(NamedTuple):
    """Of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelFileInfo:
    """What a model file says besides its weights."""

    path: Path
    description: ModelDescription
    source: dict[str, Any]  # run, step, scores, versions, and how the weights were kept
    dtype: str  # of the stored weights


def metadata_text(info: ModelFileInfo) -> str:
    """The JSON of a model file, for graphs that are made of it."""
    return _text(info.description, info.source)


def _text(description: ModelDescription, source: Mapping[str, Any]) -> str:
    content = {"format_version": FORMAT_VERSION, "model": description.as_dict(), "source": dict(source)}
    return json.dumps(content)


def check_new(out: Path, overwrite: bool, source: Path) -> None:
    """Raise UserError unless a file made of `source` can be written to `out`: a new one, or in place if `overwrite`.

    What is to be read is never written to: `source` itself, a run's checkpoints and whatever else it holds but files
    that were made of it.
    """
    if _is_part(out.resolve(), source.resolve()):
        raise UserError(f"{out} is a part of {source}, which is to be read; another place is needed; choose one")
    if out.is_file() and not overwrite:
        raise UserError(f"{out} exists; a new file is needed; choose another name, or give --overwrite")
    check_place(out)


def _is_part(out: Path, source: Path) -> bool:
    run = next((path for path in (source, *source.parents) if (path / RECORD).is_file()), source)
    if out == source or run / CHECKPOINTS in out.parents:
        return True
    if run not in out.parents or not out.is_file():
        return False
    figures = out.suffix == ".json" and out.parent == run and out.name != RECORD
    return not figures and out.suffix not in MODELS


def write_model_file(
    path: Path,
    model_state: Mapping[str, Tensor] | Mapping[str, Iterable[Tensor]],
    description: ModelDescription,
    source: Mapping[str, Any],
    dtype: str | None = None,
) -> None:
    """Write a model file, to a name that readers do not know yet: see files.replacing. `model_state` is that of
    `description.build()`, and is asked for one tensor at a time; it may give a tensor's elements in several runs.

    Parameters are stored as `dtype`, or, if it is None, as they are; buffers, of a wide range, as they are in any case.
    """
    # The first key is that of the format's convention: who reads the tensors.
    metadata = {"format": "pt", METADATA_KEY: _text(description, source)}
    if dtype is None:
        forms = {name: _form(tensor) for name, tensor in model_state.items()}
    else:
        with torch.device("meta"):
            model = description.build()
        forms = {name: _form(tensor) for name, tensor in model.state_dict().items()}
        parameters = {name for name, _ in model.named_parameters()}
        forms |= {name: Form(torch_dtype(dtype), forms[name].shape) for name in parameters}
    write_tensors(path, model_state, forms, metadata)


def _form(tensor: object) -> Form:
    assert isinstance(tensor, Tensor), "runs have no form of their own: say the dtype"
    return Form(tensor.dtype, tuple(tensor.shape))


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor] | Mapping[str, Iterable[Tensor]],
    forms: Mapping[str, Form],
    metadata: Mapping[str, str],
) -> None:
    """A safetensors file, one tensor after the other, whole or in runs, each in the form that it is to have."""
    # Widest numbers first, as the format's own writer has them: each tensor then begins at a multiple of its numbers.
    order = sorted(forms, key=lambda name: (-forms[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        dtype, shape = forms[name]
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name]
            written = 0
            for run in (tensor,) if isinstance(tensor, Tensor) else tensor:
                numbers = run.to(forms[name].dtype).contiguous().reshape(-1)
                file.write(numbers.view(torch.uint8).numpy().data)
                written += len(numbers)
            assert written == prod(forms[name].shape), name


def read_model_file(path: Path) -> tuple[FCN, ModelFileInfo]:
    """The network in evaluation mode, its weights in float32 on the CPU, and what the file says of it.

    Raises UserError if `path` is no model file, or not a whole one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            content = _content(path, file.metadata())
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except OSError as error:
        raise UserError(f"model file {path} cannot be read ({error.strerror or error}); {NEEDED}") from error
    except SafetensorError as error:
        if Path(path).suffix in GRAPHS:
            raise UserError(f"{path} is a graph for other runtimes, by its name; {NEEDED} (.safetensors)") from error
        raise UserError(f"{path} is no whole safetensors file ({error}); {NEEDED}; copy it again") from error
    try:
        description = ModelDescription.from_dict(content["model"])
        # On the meta device: a network of the described size costs nothing until its weights have been checked.
        with torch.device("meta"):
            model = description.build()
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, UserError) as error:
        raise UserError(f"{path} describes no network ({error!r}); {NEEDED}") from error
    _check_tensors(path, state, model)
    dtypes = {str(state[name].dtype).removeprefix("torch.") for name, _ in model.named_parameters()}
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model.load_state_dict(floats, assign=True)
    model.eval().requires_grad_(False)
    source = content.get("source")
    return model, ModelFileInfo(
        Path(path), description, source if isinstance(source, dict) else {}, "+".join(sorted(dtypes))
    )


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _content(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if not metadata or METADATA_KEY not in metadata:
        raise UserError(f"{path} is a safetensors file, but not a model of fcn_dist; {NEEDED}")
    try:
        content = json.loads(metadata[METADATA_KEY], parse_constant=_no_number)
        json.dumps(content, ensure_ascii=False).encode()  # half a character can be written as \ud800, but not shown
        version = content["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: its {METADATA_KEY} metadata is damaged ({error!r}); {NEEDED}") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has model format {version!r}, and this fcn_dist reads format {FORMAT_VERSION}; convert the run "
            "again with this version, or install the version that wrote the file"
        )
    assert isinstance(content, dict)
    return content


def _check_tensors(path: Path, state: Mapping[str, Tensor], model: FCN) -> None:
    """Exactly the network's tensors, in its shapes."""
    needed = model.state_dict()
    problems = [f"{name} is missing" for name in needed if name not in state]
    problems += [f"{name} is not part of the network" for name in state if name not in needed]
    for name, tensor in state.items():
        if name in needed and tensor.shape != needed[name].shape:
            problems.append(f"{name} is {tuple(tensor.shape)}, not {tuple(needed[name].shape)}")
        elif name in needed and tensor.is_floating_point() != needed[name].is_floating_point():
            problems.append(f"{name} is {tensor.dtype}")
    if problems:
        raise UserError(f"the weights in {path} are not those of the network it describes: {named(problems)}")
