"""Labels and a model in; what the server answers about them out."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcn_dist.deploy.colours import distinct
from fcn_dist.deploy.pictures import short_name
from fcn_dist.deploy.predict import Predictor, classes_found
from fcn_dist.serving.limits import Limits

FORMATS = {"json": "application/json", "png": "image/png"}  # the first where any will do
# Pillow reads more kinds, some by running other programs; a server takes those that people have.
KINDS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


def preferred(accept: str) -> str | None:
    """The format that an Accept header (RFC 9110, 12.5.1) likes best; None if it wants neither."""
    wanted: dict[str, float] = {}
    for part in (accept or "*/*").lower().split(","):
        kind, *parameters = (text.strip() for text in part.split(";"))
        quality = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        wanted[kind] = float(quality) if quality.replace(".", "", 1).isdecimal() else 1.0

    def weight(name: str) -> float:
        media = FORMATS[name]
        patterns = (media, media.partition("/")[0] + "/*", "*/*")
        return next((wanted[pattern] for pattern in patterns if pattern in wanted), 0.0)

    best = max(FORMATS, key=weight)
    return best if weight(best) else None


def label_png(labels: NDArray[np.uint8]) -> bytes:
    """8-bit gray, as `predict` writes it."""
    file = io.BytesIO()
    Image.fromarray(labels).save(file, "PNG")
    return file.getvalue()


def figures(name: str, labels: NDArray[np.uint8], predictor: Predictor) -> dict[str, Any]:
    """Label, name, pixels and share of each class in the image, the largest first."""
    return {
        "image": name,
        "width": labels.shape[1],
        "height": labels.shape[0],
        "model": predictor.info.path.name,
        "classes": classes_found(labels, predictor.classes),
    }


def model_card(predictor: Predictor, limits: Limits) -> dict[str, Any]:
    """What the page and scripts need to know of the model: label 0 is "other"."""
    colours = distinct(predictor.colours)
    classes = [
        {"label": label, "name": name, "short_name": short_name(name), "colour": "#{:02x}{:02x}{:02x}".format(*colour)}
        for label, (name, colour) in enumerate(zip(predictor.classes, colours, strict=True), 1)
    ]
    return {
        "model": predictor.info.path.name,
        "source": predictor.info.source,
        "device": str(predictor.device),
        "precision": predictor.precision,
        "classes": classes,
        "max_bytes": limits.max_bytes,
        "max_pixels": limits.max_pixels,
    }
