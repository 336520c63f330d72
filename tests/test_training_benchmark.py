"""The peer of the training benchmark is the published network, the search finds what fits, and tables say what was."""

from math import floor
from pathlib import Path

import pytest
import torch
from measure import Contender, Measured, run_rounds
from torch import nn
from torch.nn import functional as F
from training import OURS_BF16, PEER_FP32, RECOMPUTED, cpu_targets, gpu_targets, largest_table, steps_table
from training_peer import PeerFCN8s, PeerTrainer, bilinear, learned, summed_loss
from training_steps import TOLERANCE, draw_scenes, largest_that_fits

from fcn_dist.model.devices import peak_flops

CONTENDERS = {name: Contender(name, "", {}, "does") for name in (OURS_BF16, PEER_FP32, RECOMPUTED, "peer, autocast")}


@pytest.fixture(scope="module")
def peer() -> PeerFCN8s:
    with torch.device("meta"):  # shapes alone
        return PeerFCN8s(151)


@pytest.mark.parametrize("size", [(256, 256), (97, 131), (1, 1), (333, 500)])
def test_the_peer_scores_every_pixel_of_any_size(peer: PeerFCN8s, size: tuple[int, int]) -> None:
    assert peer(torch.zeros(1, 3, *size, device="meta")).shape == (1, 151, *size)


def test_the_peer_learns_what_the_reference_learns(peer: PeerFCN8s) -> None:
    """The published count at 151 outputs is that of the convolutions; the frozen deconvolutions come on top of it."""
    weights, biases = list(learned(peer, bias=False)), list(learned(peer, bias=True))
    assert sum(p.numel() for p in weights + biases) == 134_995_461
    frozen = [m.weight.numel() for m in peer.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert frozen == [151 * 151 * side**2 for side in (4, 4, 16)]
    assert sum(p.numel() for p in peer.parameters()) == 134_995_461 + sum(frozen)


def test_the_peers_deconvolution_is_bilinear_interpolation() -> None:
    coarse = torch.randn(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    full = F.conv_transpose2d(coarse, bilinear(3, 16), stride=8)[:, :, 4:-4, 4:-4]
    expected = F.interpolate(coarse, scale_factor=8, mode="bilinear", align_corners=False)
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))  # at the border it fades to zero
    torch.testing.assert_close(full[inner], expected[inner])


def test_the_peers_loss_is_the_sum_over_labelled_pixels() -> None:
    random = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(2, 5, 4, 3, generator=random), torch.randint(-1, 5, (2, 4, 3), generator=random)
    rows, picked = scores.permute(0, 2, 3, 1).reshape(-1, 5), labels.reshape(-1)
    expected = sum(rows[i].logsumexp(0) - rows[i, label] for i, label in enumerate(picked) if label >= 0)
    torch.testing.assert_close(summed_loss(scores, labels), expected)


def test_scenes_are_the_same_for_all_and_hold_every_kind_of_label() -> None:
    scenes, again = (draw_scenes(70, 32, 151, on_gpu=False) for _ in range(2))
    assert torch.equal(scenes.images, again.images) and torch.equal(scenes.targets, again.targets)
    assert scenes.images.shape == (70, 32, 32, 3) and scenes.targets.shape == (70, 32, 32)
    labelled = scenes.targets[scenes.targets != scenes.ignored]
    assert 0.9 < labelled.numel() / scenes.targets.numel() < 0.95 and labelled.max() == 150 and labelled.min() == 0


def test_the_peer_is_given_the_same_pixels_and_labels() -> None:
    scenes = draw_scenes(2, 32, 7, on_gpu=False)
    trainer = PeerTrainer.__new__(PeerTrainer)  # a network of full width is not needed for it
    images, labels = trainer.prepare(scenes)
    assert images.is_contiguous() and images.dtype == torch.float32 and labels.dtype == torch.int64
    blue = scenes.images[..., 2].float() - 104.00699
    torch.testing.assert_close(images[:, 0], blue)
    assert torch.equal(labels == -1, scenes.targets == scenes.ignored)
    assert torch.equal(labels[labels >= 0], scenes.targets[scenes.targets != scenes.ignored].long())


@pytest.mark.parametrize("room", [0, 1, 2, 3, 7, 100, 513, 5000])
@pytest.mark.parametrize("start", [1, 64])
def test_the_largest_batch_is_found_within_a_few_per_cent(room: int, start: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= room

    found = largest_that_fits(fits, start)
    assert floor(room / (1 + TOLERANCE)) - 1 <= found <= room
    assert found == 0 or found in tried
    assert len(tried) <= 22


def test_a_search_without_an_end_is_ended() -> None:
    assert largest_that_fits(lambda batch: True, 1) == 1 << 14


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
    ],
)
def test_the_peak_is_that_of_the_whole_device_of_this_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_steps_are_set_against_the_peer_as_its_users_run_it() -> None:
    measured = [
        Measured(CONTENDERS[OURS_BF16], [cpu_figures(0.3), cpu_figures(0.2), cpu_figures(0.9)]),
        Measured(CONTENDERS[PEER_FP32], [cpu_figures(1.0)]),
        Measured(CONTENDERS["peer, autocast"], problem="failed: no\nroom"),
    ]
    ours, peer, failed = steps_table(measured, 2, on_gpu=False, peak=None).rows
    assert ours == (OURS_BF16, "300", "200", "900", "6.67", "0.30", "0.60", "3.00", "does")
    assert peer[5] == "1.00" and failed[-1] == "room"
    assert [target.found for target in cpu_targets(measured)] == pytest.approx([0.3, 0.3])
    assert [target.row()[-1] for target in cpu_targets(measured[1:])] == ["not measured"] * 2


def cpu_figures(step: float) -> dict[str, float]:
    return {"step": step, "images/s": 2 / step, "CPU s": 2 * step, "resident": 3e9}


def test_targets_of_a_gpu_are_read_at_each_ones_own_largest_batch() -> None:
    def largest(rate: float) -> dict[str, object]:
        batches = {"12": 600, "24": 1300}
        return {"batches": batches, "whole": 5000, "batch": 4900, "images/s": rate, "flops": 1e12, "stopped by": []}

    none_fits = {"batches": {"12": 0}, "whole": 0, "stopped by": ["illegal"]}
    measured = [
        Measured(CONTENDERS[OURS_BF16], [largest(90.0)]),
        Measured(CONTENDERS[PEER_FP32], [largest(30.0)]),
        Measured(CONTENDERS["peer, autocast"], [largest(50.0)]),
        Measured(CONTENDERS[RECOMPUTED], [largest(20.0) | {"batches": {"12": 900}, "whole": None, "batch": 900}]),
    ]
    assert largest_table(measured, 2e14).rows[3][1:7] == ("900", "-", "-", "-", "900", "20.0")
    assert largest_table(measured, 2e14).rows[0][1:8] == ("600", "1300", "-", "5000", "4900", "90.0", "45.0")
    assert [target.found for target in gpu_targets(measured, 2e14)] == pytest.approx([3, 1.8, 45, 900])
    without = [Measured(CONTENDERS[OURS_BF16], [none_fits])]
    assert largest_table(without, 2e14).rows[0][1:8] == ("0", "-", "-", "0", "-", "0.0", "0.0")
    assert "stopped by: illegal" in largest_table(without, 2e14).rows[0][8]


def test_when_time_is_up_what_is_left_is_left_out(tmp_path: Path) -> None:
    (measured,) = run_rounds([Contender("late", "missing:module", {})], 2, tmp_path, time_limit=0)
    assert measured.rounds == [] and measured.problem == "not measured: 0 s were over before its turn"
