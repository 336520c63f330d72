"""What training holds for an image, as torch's tracker of tensors sees it: no device and no time is needed for that.

FCN-8s on VGG16, 151 outputs, 256x256, bfloat16; above parameters and gradients, pixels and labels included.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from fcn_dist.config import ModelConfig
from fcn_dist.model.fcn import FCN
from fcn_dist.model.loss import summed_cross_entropy

MEGABYTE = 1_000_000
SIZE = 256


def peak(batch: int, recompute_stages: int, backbone: str = "vgg16") -> float:
    """Megabytes an image at the moment when most is held, without parameters and gradients at that moment."""
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = FCN(151, ModelConfig(backbone=backbone))  # type: ignore[arg-type]
        finally:
            torch.set_default_dtype(torch.float32)
        model.recompute_stages, model.recompute_images = recompute_stages, 8
        pixels = torch.zeros(batch, SIZE, SIZE, 3, dtype=torch.uint8)
        labels = torch.zeros(batch, SIZE, SIZE, dtype=torch.uint8)
        tracker = MemTracker()
        tracker.track_external(model, pixels, labels)
        with tracker:
            loss = summed_cross_entropy(model(pixels, coarse=True, dropout_keys=range(batch)), labels, model.stride)
            loss.backward()  # type: ignore[no-untyped-call]
    held = {str(kind).rpartition(".")[2]: size for kind, size in tracker.get_tracker_snapshot("peak")[CPU].items()}
    assert held["PARAM"] == 2 * sum(p.numel() for p in model.parameters())
    return float(held["Total"] - held["PARAM"] - held["GRAD"]) / batch / MEGABYTE


CPU = torch.device("cpu")


@pytest.mark.parametrize(("batch", "recompute_stages", "limit"), [(32, 0, 26), (32, 2, 12), (32, 3, 8), (64, 3, 7)])
def test_an_image_holds_no_more_than(batch: int, recompute_stages: int, limit: float) -> None:
    assert limit / 2 < peak(batch, recompute_stages) < limit


@pytest.mark.slow
def test_with_recomputation_a_larger_batch_holds_less_for_an_image() -> None:
    """What early stages hold for a while is that of eight images."""
    held = peak(128, 2)
    assert held < peak(32, 2) and held < 12
