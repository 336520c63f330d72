"""A run's checkpoint in, a graph for other runtimes out: ONNX, or torch.export's .pt2; proven before it appears.

The graph takes `image`, RGB uint8 (N, H, W, 3), N, H and W of any size (.pt2: at least SMALLEST pixels a side), and
gives `labels`, uint8 (N, H, W), as annotated, and `scores`, float32 (N, C, H, W). Beside it lies the JSON of the model
file's metadata: in ONNX the metadata property `fcn_dist`, in .pt2 the extra file of that name.

Shapes: N images, C outputs, H x W pixels.
"""

import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from fcn_dist.checkpoints.consolidate import Weights
from fcn_dist.checkpoints.store import of_checkpoint, while_removed
from fcn_dist.deploy.convert import Conversion, convert
from fcn_dist.deploy.modelfile import GRAPHS, METADATA_KEY, ModelFileInfo, check_new, metadata_text, read_model_file
from fcn_dist.deploy.proof import Agreement, read_probe
from fcn_dist.errors import UserError
from fcn_dist.files import replacing
from fcn_dist.model.fcn import FCN
from fcn_dist.model.upsampling import upsample

FORMS = tuple(GRAPHS.values())
NEEDS = ("onnx", "onnxscript", "onnxruntime")
SMALLEST = 33  # torch.export takes a map of one cell for one that is the same at every place
# No side a multiple of 8, and odd numbers of cells: an example of the general case, as tracing wants it.
EXAMPLE = (2, 67, 99)
# Compared besides the probe: one image and several, sides that are multiples of 32 and that are not.
SIZES = ((1, 64, 96), (1, 33, 131), (3, 50, 33))
# Both compute in float32; what is left is the order of additions. Seen: 4e-6 of the largest score.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Export:
    """What was exported, and how it was checked."""

    path: Path
    form: str
    conversion: Conversion  # of the weights
    probe: Agreement  # with the scores that the training engine recorded
    network: Agreement  # with the converted network, on images of several sizes
    labels: int  # compared with the network's, those of nearly equal scores left out


class _Labelling(nn.Module):
    """What is exported."""

    def __init__(self, model: FCN, info: ModelFileInfo) -> None:
        super().__init__()
        self.model = model
        for layer in (model.fc6, model.fc7):
            layer.by_columns = False  # what a CPU computes here with depends on the image's size
        table = list(info.description.label_rule.label_table)[: model.num_outputs]
        self.register_buffer("table", torch.tensor(table, dtype=torch.uint8))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.model(image)
        assert isinstance(self.table, Tensor)
        return self.table[scores.argmax(1)], scores


Run = Callable[[Tensor], tuple[Tensor, Tensor]]


def export(
    run: str | Path,
    out: str | Path,
    form: str,
    *,
    step: int | None = None,
    weights: Weights | None = None,
    overwrite: bool = False,
) -> Export:
    """Write the graph of a checkpoint, chosen as `convert` does, with its weights in float32.

    `form` is "onnx", which needs the extra `onnx`, or "torch-export". The file appears only after it was loaded by its
    runtime and gave the scores that the training engine recorded, and those of the network for images of several
    sizes. Raises UserError if they differ, as `convert` does, or if the extra is not installed.
    """
    out = Path(out)
    if form not in FORMS:
        raise UserError(f"form is {form!r}; one of {', '.join(FORMS)} is needed")
    if form == "onnx" and (missing := [name for name in NEEDS if not find_spec(name)]):
        raise UserError(
            f"exporting to ONNX needs {', '.join(missing)}; install the extra: pip install 'fcn-dist[onnx]'"
        )
    check_new(out, overwrite, Path(run))
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:

        def convert_and_read() -> tuple[Conversion, Tensor, Tensor]:
            found = convert(run, Path(folder) / "model.safetensors", step=step, weights=weights, overwrite=True)
            with of_checkpoint(found.checkpoint.dir):
                image, scores, _ = read_probe(found.checkpoint, found.weights)
            return found, image, scores

        conversion, image, recorded = while_removed(convert_and_read, Path(run))
        model, info = read_model_file(conversion.path)
        with replacing(out) as partial:
            graph = _write_onnx(model, info, partial) if form == "onnx" else _write_pt2(model, info, partial)
            probe = _compare_probe(graph, image, recorded, model)
            network, labels = _compare_network(graph, model, info)
            for agreement, other in ((probe, "the training engine recorded"), (network, "the network gives")):
                if not agreement.difference <= agreement.tolerance:  # not a number fails, too
                    raise UserError(
                        f"the {form} graph of {conversion.checkpoint.dir} does not give the scores that {other}: they "
                        f"differ by {agreement.difference:.2g} of the largest score, and at most "
                        f"{agreement.tolerance:.2g} is rounding; nothing was written; take the model file instead"
                    )
    return Export(out, form, conversion, probe, network, labels)


def _write_onnx(model: FCN, info: ModelFileInfo, path: Path) -> Run:
    import onnx
    import onnxruntime

    names = {0: "images", 1: "height", 2: "width"}
    with _quiet():
        program = torch.onnx.export(
            _Labelling(model, info).eval(),
            (torch.zeros(*EXAMPLE, 3, dtype=torch.uint8),),
            dynamo=True,
            input_names=["image"],
            output_names=["labels", "scores"],
            dynamic_shapes={"image": names},
            verbose=False,
        )
    assert program
    program.model.metadata_props[METADATA_KEY] = metadata_text(info)
    program.save(path, external_data=False)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map[METADATA_KEY]

    def graph(image: Tensor) -> tuple[Tensor, Tensor]:
        labels, scores = session.run(["labels", "scores"], {"image": image.numpy()})
        return torch.from_numpy(labels), torch.from_numpy(scores)

    return graph


def _write_pt2(model: FCN, info: ModelFileInfo, path: Path) -> Run:
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    with _quiet():
        program = torch.export.export(
            _Labelling(model, info).eval(),
            (torch.zeros(*EXAMPLE, 3, dtype=torch.uint8),),
            dynamic_shapes={"image": dynamic},
        )
        with _Patient(path.open("wb", buffering=0)) as file:
            torch.export.save(program, file, extra_files={METADATA_KEY: metadata_text(info)})
        extra = {METADATA_KEY: ""}
        with path.open("rb") as written:
            loaded = torch.export.load(written, extra_files=extra).module()
    assert json.loads(extra[METADATA_KEY])

    def graph(image: Tensor) -> tuple[Tensor, Tensor]:
        labels, scores = loaded(image)
        return labels, scores

    return graph


class _Patient(io.BufferedWriter):
    """A file that fails when it is closed, and not before: torch's writer would abort the process."""

    _failure: OSError | None = None

    def write(self, data: Any) -> int:
        """All of it, or nothing more."""
        if self._failure is None:
            try:
                super().write(data)
            except OSError as error:
                self._failure = error
        return len(data)

    def flush(self) -> None:
        """As far as it goes."""
        if self._failure is None:
            try:
                super().flush()
            except OSError as error:
                self._failure = error

    def __exit__(self, *_: object) -> None:
        """Raises OSError if not all has been written."""
        self.flush()
        self.raw.close()
        if self._failure:
            raise self._failure


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters tell of what is not there and not needed."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _compare_probe(graph: Run, image: Tensor, coarse: Tensor, model: FCN) -> Agreement:
    """With the scores recorded of `image`, which are coarse and of the engine's arithmetic; upsampling only mixes them.

    In 16 bits the engine rounds after every layer. How much that is depends on the weights, so it is seen by the
    network itself, which gave the recorded scores in that arithmetic, and here computes in float32.
    """
    size = (image.shape[1], image.shape[2])
    recorded = upsample(coarse.float(), size, model.stride, model.offset)
    with torch.inference_mode():
        _, found = graph(image)
        rounding = _difference(model(image), recorded)
    tolerance = rounding + TOLERANCE
    return Agreement("float32 on cpu", recorded.numel(), _difference(found, recorded), tolerance)


def _compare_network(graph: Run, model: FCN, info: ModelFileInfo) -> tuple[Agreement, int]:
    """Scores, and labels wherever the best score leads by more than rounding."""
    pixels = torch.Generator().manual_seed(0)
    table = torch.tensor(list(info.description.label_rule.label_table), dtype=torch.uint8)
    scores, labels, difference = 0, 0, 0.0
    for size in SIZES:
        image = torch.randint(0, 256, (*size, 3), generator=pixels, dtype=torch.uint8)
        with torch.inference_mode():
            wanted = model(image)
            found_labels, found = graph(image)
        difference = float(np.maximum(difference, _difference(found, wanted)))  # keeps what is not a number
        scores += wanted.numel()
        best = wanted.topk(min(2, wanted.shape[1]), dim=1).values
        clear = (best[:, 0] - best[:, -1]) > 2 * TOLERANCE * wanted.abs().max()
        labels += int(clear.sum())
        if not torch.equal(found_labels[clear], table[wanted.argmax(1)][clear]):
            difference = float("inf")
    return Agreement("float32 on cpu", scores, difference, TOLERANCE), labels


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, as a share of the largest score; infinite if the shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).abs().max()) / (float(wanted.abs().max()) or 1.0)
