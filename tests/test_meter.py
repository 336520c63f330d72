"""The share of the devices' peak: by hand, and left open where the peak is not known."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fcn_dist.config import ModelConfig
from fcn_dist.model.fcn import FCN
from fcn_dist.training.meter import flops_utilisation

H100 = "NVIDIA H100 80GB HBM3"


def utilisation(
    monkeypatch: pytest.MonkeyPatch, name: str = H100, device: str = "cuda", precision: str = "bfloat16"
) -> Any:
    """With 1000 images a second on two ranks."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    with torch.device("meta"):
        engine = SimpleNamespace(module=FCN(151, ModelConfig()))
    job = SimpleNamespace(
        device=torch.device(device),
        config=SimpleNamespace(precision=precision),
        recipe=SimpleNamespace(data=SimpleNamespace(crop=(256, 256))),
        rank=SimpleNamespace(world_size=2),
    )
    return flops_utilisation(job, engine, 1000.0)  # type: ignore[arg-type]


def test_it_is_the_network_s_arithmetic_over_the_devices_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """VGG16's 13 convolutions at 256x256, fc6, fc7 and the score layers, multiplied out here."""
    trunk = [(3, 64, 65536), (64, 64, 65536), (64, 128, 16384), (128, 128, 16384)]
    trunk += [
        (128, 256, 4096),
        *[(256, 256, 4096)] * 2,
        (256, 512, 1024),
        *[(512, 512, 1024)] * 2,
        *[(512, 512, 256)] * 3,
    ]
    products = [9 * inputs * outputs * cells for inputs, outputs, cells in trunk]
    products += [49 * 512 * 4096 * 64, 4096 * 4096 * 64, 4096 * 151 * 64, 512 * 151 * 256, 256 * 151 * 1024]
    # The first layer's input needs no gradient.
    flops = 2 * (3 * sum(products) - products[0])
    assert utilisation(monkeypatch) == pytest.approx(1000 * flops / (2 * 989e12))


def test_without_a_known_peak_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert utilisation(monkeypatch, name="NVIDIA GeForce RTX 4090") is None
    assert utilisation(monkeypatch, device="cpu") is None
    assert utilisation(monkeypatch, precision="float32") is None
