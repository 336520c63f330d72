"""What training holds for an image, as torch's tracker of tensors sees it: no device and no time is needed for that.

FCN-8s on VGG16, 151 outputs, 256x256, bfloat16; above parameters and gradients, pixels and labels included.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from fcn_dist.model import recompute
from fcn_dist.model.fcn import FCN
from fcn_dist.model.loss import summed_cross_entropy
from fcn_dist.training.footprint import RehearsedLoss, default_dtype

Loss = Callable[[Tensor, Tensor, int], Tensor]
MEGABYTE = 1_000_000
SIZE = 256


def peak(batch: int, recompute_stages: int, loss_of: Loss = summed_cross_entropy) -> float:
    """Megabytes an image at the moment when most is held, without parameters and gradients at that moment."""
    with FakeTensorMode():
        with default_dtype(torch.bfloat16):
            model = FCN(151)
        model.recompute_stages, model.recompute_images = recompute_stages, 8
        pixels = torch.zeros(batch, SIZE, SIZE, 3, dtype=torch.uint8)
        labels = torch.zeros(batch, SIZE, SIZE, dtype=torch.uint8)
        tracker = MemTracker()
        tracker.track_external(model, pixels, labels)
        with tracker:
            loss = loss_of(model(pixels, coarse=True, dropout_keys=range(batch)), labels, model.stride)
            loss.backward()  # type: ignore[no-untyped-call]
    held = {str(kind).rpartition(".")[2]: size for kind, size in tracker.get_tracker_snapshot("peak")[CPU].items()}
    assert held["PARAM"] == 2 * sum(p.numel() for p in model.parameters())
    return float(held["Total"] - held["PARAM"] - held["GRAD"]) / batch / MEGABYTE


CPU = torch.device("cpu")


def rehearsed(scores: Tensor, targets: Tensor, stride: int) -> Tensor:
    loss: Tensor = RehearsedLoss.apply(scores, targets, stride)  # type: ignore[no-untyped-call]
    return loss


@pytest.mark.parametrize(("recompute_stages", "limit"), [(0, 26), (2, 12)])
def test_an_image_holds_no_more_than(recompute_stages: int, limit: float) -> None:
    assert limit / 2 < peak(32, recompute_stages, rehearsed) < limit


# Tiles of all images take minutes here, and hold what those of the first do.
@pytest.mark.parametrize(("batch", "recompute_stages"), [(1, 0), (3, 2)])
def test_a_rehearsed_loss_holds_what_the_loss_does(batch: int, recompute_stages: int) -> None:
    assert peak(batch, recompute_stages, rehearsed) == peak(batch, recompute_stages)


@pytest.mark.parametrize(("batch", "limit"), [(32, 8), (64, 7)])
def test_an_image_holds_no_more_with_three_stages_recomputed(batch: int, limit: float) -> None:
    assert limit / 2 < peak(batch, 3, rehearsed) < limit


def test_nor_where_weights_are_partitioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "PARTITIONED", "data")  # which all parameters then pass for
    assert 4 < peak(32, 3, rehearsed) < 8


def test_with_recomputation_a_larger_batch_holds_less_for_an_image() -> None:
    """What early stages hold for a while is that of eight images."""
    held = peak(128, 2, rehearsed)
    assert held < peak(32, 2, rehearsed) and held < 12
