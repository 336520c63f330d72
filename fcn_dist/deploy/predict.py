"""A model file in, labels or scores of images out; on one GPU or the CPU.

Shapes: H x W pixels, C outputs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fcn_dist.deploy.modelfile import ModelFileInfo, read_model_file
from fcn_dist.deploy.modelurl import local_copy
from fcn_dist.errors import UserError
from fcn_dist.model.devices import multiplies
from fcn_dist.model.fcn import FCN, torch_dtype
from fcn_dist.model.inference import for_inference
from fcn_dist.model.upsampling import argmax_upsampled, upsample
from fcn_dist.model.views import Views, label_views

AUTO = "auto"
PRECISIONS = (AUTO, "float32", "bfloat16", "float16")


class Predictor:
    """A loaded network: load once, predict many. Make one with `Predictor.from_file`."""

    def __init__(self, model: FCN, info: ModelFileInfo, device: torch.device, precision: str, views: Views) -> None:
        self.info = info
        self.device = device
        self.precision = precision
        self.views = views
        self._model = for_inference(model.to(device, torch_dtype(precision)))
        table = np.frombuffer(info.description.label_rule.label_table, dtype=np.uint8)
        self._labels: NDArray[np.uint8] = table

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        precision: str = AUTO,
        views: Views = Views(),  # noqa: B008 - frozen
        sha256: str | None = None,
    ) -> "Predictor":
        """Read a model file; `device` as torch names it, by default a GPU if there is one.

        `path` may be a folder that has one, or a URL that fsspec knows with the file's hash,
        `https://host/model.safetensors#sha256=...`, or with `sha256` beside it; it is fetched once and kept in the
        cache of this machine.

        The network computes in `precision`: "float32", "bfloat16" or "float16"; "auto" is bfloat16 on devices that
        multiply it, and float32 on others. `views` says how `predict` looks at an image. Raises UserError if the file
        is no model file, the device is not there, or the precision none of these.
        """
        if precision not in PRECISIONS:
            raise UserError(f"precision is {precision!r}; one of {', '.join(PRECISIONS)} is needed")
        found = _device(device)
        if precision == AUTO:
            precision = "bfloat16" if multiplies(found, torch.bfloat16) else "float32"
        model, info = read_model_file(local_copy(path, sha256))
        return cls(model, info, found, precision, views)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of labels 1..N."""
        return self.info.description.classes

    @property
    def colours(self) -> tuple[tuple[int, int, int], ...]:
        """RGB of labels 1..N."""
        return self.info.description.colours

    def predict(self, image_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Labels (H, W) uint8 of an RGB uint8 image of any size: 1..N as annotated; 0, "other", if it is learned.

        Raises ValueError if the image is of another kind. Full-size scores are never held.
        """
        if not self.views.plain:
            return self.predict_with_confidence(image_HW3)[0]
        return self.predict_many([image_HW3])[0]

    def predict_many(self, images_HW3: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """`predict` of each image; those of one size are computed together, which small ones gain from.

        Images computed together take memory together: give as many as fit. Raises ValueError as `predict` does.
        """
        if not self.views.plain:
            return [self.predict(image) for image in images_HW3]
        checked = [self._checked(image) for image in images_HW3]
        of_size: dict[tuple[int, int], list[int]] = {}
        for number, image in enumerate(checked):
            of_size.setdefault((image.shape[1], image.shape[2]), []).append(number)
        found: dict[int, NDArray[np.uint8]] = {}
        stride, offset = self._model.stride, self._model.offset
        for size, numbers in of_size.items():
            coarse = self._coarse(torch.cat([checked[number] for number in numbers]))
            outputs = argmax_upsampled(coarse, size, stride, offset).cpu().numpy()
            found |= {number: self._labels[outputs[place]] for place, number in enumerate(numbers)}
        return [found[number] for number in range(len(checked))]

    def predict_with_confidence(self, image_HW3: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Labels as `predict` gives them, and the probability of each, (H, W) float32; takes longer."""
        image = self._checked(image_HW3)
        outputs, found = label_views(self._coarse, image, self.views, self._model.stride, self._model.offset)
        labels: NDArray[np.uint8] = self._labels[outputs.numpy()]
        confidence: NDArray[np.float32] = found.numpy()
        return labels, confidence

    def scores(self, image_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scores (C, H, W) float32 of an RGB uint8 image: C times the image's size; prefer `predict`.

        Output c is label c + 1, or label c if the model also scores label 0. Raises ValueError as `predict` does.
        """
        coarse = self._coarse(self._checked(image_HW3))
        height, width = image_HW3.shape[:2]
        scores = upsample(coarse.float(), (height, width), self._model.stride, self._model.offset)
        found: NDArray[np.float32] = scores[0].cpu().numpy()
        return found

    @torch.inference_mode()
    def _coarse(self, image_1HW3: Tensor) -> Tensor:
        coarse: Tensor = self._model(image_1HW3, coarse=True)
        return coarse

    def _checked(self, image: Any) -> Tensor:
        """The image on the device, (1, H, W, 3)."""
        if not isinstance(image, np.ndarray):
            raise ValueError(f"the image is a {type(image).__name__}; an RGB array is needed: np.asarray(image)")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"the image is {image.dtype} of shape {image.shape}; RGB of dtype uint8 and shape (H, W, 3) is needed: "
                'with Pillow, np.asarray(image.convert("RGB"))'
            )
        # A copy: torch takes no arrays that are read-only or run backwards.
        return torch.from_numpy(image.copy()).unsqueeze(0).to(self.device)


def classes_found(labels: NDArray[np.uint8], classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Label, name, pixels and share of each class in the picture, the largest first."""
    counts = np.bincount(labels.ravel(), minlength=len(classes) + 1)
    return [
        {
            "label": int(label),
            "name": classes[label - 1] if label else "other",
            "pixels": int(counts[label]),
            "share": int(counts[label]) / labels.size,
        }
        for label in np.argsort(-counts, kind="stable")
        if counts[label]
    ]


def _device(name: str | torch.device | None) -> torch.device:
    """The device of that name, tried out."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device {str(name)!r} cannot be used ({str(error).splitlines()[0]}); cpu, or cuda on a machine with a "
            "GPU, is needed; leave the device out to take what there is"
        ) from error
    return device
