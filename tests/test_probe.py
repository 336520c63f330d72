"""The image that a conversion is proven with: a network with one other weight would show it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DESCRIPTION, tiny_network

from fcn_dist.deploy.proof import TOLERANCES
from fcn_dist.training.state import PROBE_SIZE, probe_image


@pytest.mark.parametrize("geometry", ["same", "reference"])
def test_every_layer_and_every_place_of_its_kernel_takes_part_in_the_scores(geometry: Any) -> None:
    """By gradients: what a score does not depend on has none. fc6 at 96 pixels would have 25 places of 49."""
    model = tiny_network(replace(DESCRIPTION, config=replace(DESCRIPTION.config, geometry=geometry)))
    model.requires_grad_(True)
    model(probe_image(), coarse=True).square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        places = weight.grad.abs().flatten(2).amax((0, 1)) if weight.ndim == 4 else weight.grad.abs().max()
        assert (places > 0).all(), name


def test_it_is_the_same_each_time() -> None:
    image = probe_image()
    assert image.dtype == torch.uint8 and torch.equal(image, probe_image())
    assert image.float().std() > 30


def test_the_page_has_the_size_and_the_tolerances() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "modelfile.md").read_text()
    section = page.split("## What is proven")[1].split("## ")[0]
    assert f"an image of {PROBE_SIZE[0]}x{PROBE_SIZE[1]} " in section
    row = [float(cell) for cell in re.findall(r"\de-\d", section)]
    assert row == [TOLERANCES["float32"], TOLERANCES["float16"], TOLERANCES["bfloat16"]]
    assert TOLERANCES["tf32"] == TOLERANCES["float16"]
