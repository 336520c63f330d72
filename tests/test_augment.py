"""Augmentation on the device: keyed by position, image and targets together, colours worked out by hand."""

import pytest
import torch
from torch import Tensor

from fcn_dist.config import DataConfig
from fcn_dist.data.loader import Batch
from fcn_dist.labels import IGNORE_LABEL
from fcn_dist.training.augment import jitter, to_device

CPU = torch.device("cpu")


def batch_at(positions: range, seed: int = 0) -> Batch:
    """Each position has pixels of its own; targets are the images' red halved."""
    rows = []
    for position in positions:
        random = torch.Generator().manual_seed(1000 * seed + position)
        rows.append(torch.randint(0, 256, (6, 9, 3), generator=random, dtype=torch.uint8))
    images = torch.stack(rows)
    return Batch(images, images[..., 0] // 2, 54 * len(rows), tuple(positions))


def augmented(positions: range, seed: int = 3, **options: float) -> tuple[Tensor, Tensor]:
    return to_device(batch_at(positions), DataConfig(**options), seed, CPU)  # type: ignore[arg-type]


def test_without_augmentation_bytes_pass_through() -> None:
    images, targets = augmented(range(5))
    assert torch.equal(images, batch_at(range(5)).images) and images.dtype == torch.uint8
    assert torch.equal(targets, batch_at(range(5)).targets) and targets.dtype == torch.uint8


def test_a_position_is_augmented_alike_in_any_batch_and_differently_under_another_seed() -> None:
    whole = augmented(range(12), jitter=0.3)
    for cut in (range(0, 4), range(4, 5), range(5, 12)):
        images, targets = augmented(cut, jitter=0.3)
        assert torch.equal(images, whole[0][cut.start : cut.stop])
        assert torch.equal(targets, whole[1][cut.start : cut.stop])
    assert not torch.equal(augmented(range(12), seed=4, jitter=0.3)[0], whole[0])


def test_the_batch_it_was_given_is_not_changed() -> None:
    batch = batch_at(range(3))
    to_device(batch, DataConfig(jitter=0.5), 0, CPU)
    assert torch.equal(batch.images, batch_at(range(3)).images)
    assert torch.equal(batch.targets, batch_at(range(3)).targets)


def test_padding_stays_ignored() -> None:
    batch = batch_at(range(8))
    batch.targets[:, :2] = IGNORE_LABEL
    _, targets = to_device(batch, DataConfig(jitter=0.5), 0, CPU)
    assert (targets[:, :2] == IGNORE_LABEL).all() and (targets[:, 2:] != IGNORE_LABEL).all()


def factors(brightness: float = 1, contrast: float = 1, saturation: float = 1) -> Tensor:
    return torch.tensor([[brightness, contrast, saturation]])


# Two pixels. Rec. 601 luma: 0.299 * 100 + 0.587 * 50 + 0.114 * 200 = 82.05, and 40 for the grey one; mean 61.025.
PIXELS = torch.tensor([[[[100, 50, 200], [40, 40, 40]]]], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (factors(), [[100, 50, 200], [40, 40, 40]]),
        (factors(brightness=1.2), [[120, 60, 240], [48, 48, 48]]),
        # Half-way to 61.025.
        (factors(contrast=0.5), [[80.5125, 55.5125, 130.5125], [50.5125, 50.5125, 50.5125]]),
        (factors(saturation=0.0), [[82.05, 82.05, 82.05], [40, 40, 40]]),
        (factors(saturation=0.5), [[91.025, 66.025, 141.025], [40, 40, 40]]),
        # 100 * 2 and 50 * 2 fit; 200 * 2 does not.
        (factors(brightness=2.0), [[200, 100, 255], [80, 80, 80]]),
        # 2 * 50 - 61.025 and 2 * 40 - 61.025 fit; 2 * 200 - 61.025 does not.
        (factors(contrast=2.0), [[138.975, 38.975, 255], [18.975, 18.975, 18.975]]),
        # One after the other: 50 is 25, and then 30.5125 - 3 * (30.5125 - 25) = 13.975.
        (factors(brightness=0.5, contrast=3.0), [[88.975, 13.975, 238.975], [0, 0, 0]]),
    ],
)
def test_colours_are_scaled_as_worked_out_by_hand(scale: Tensor, expected: list[list[float]]) -> None:
    found = jitter(PIXELS, scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0, 0], torch.tensor(expected).float(), rtol=1e-5, atol=1e-3)


def test_each_image_has_its_own_factors_and_they_stay_within_the_setting() -> None:
    grey = Batch(
        torch.full((300, 2, 2, 3), 100, dtype=torch.uint8), torch.zeros(300, 2, 2).byte(), 0, tuple(range(300))
    )
    images, _ = to_device(grey, DataConfig(jitter=0.2), 0, CPU)
    # Contrast and saturation leave a uniform grey as it is, so what is left is the brightness.
    brightness = images[:, 0, 0, 0] / 100
    assert brightness.min() >= 0.8 - 1e-5 and brightness.max() <= 1.2 + 1e-5
    assert brightness.min() < 0.82 and brightness.max() > 1.18
    assert abs(brightness.mean() - 1) < 0.03


def test_brightness_contrast_and_saturation_are_drawn_apart_from_each_other() -> None:
    base = torch.zeros(200, 1, 2, 3, dtype=torch.uint8)
    base[:, 0, 0] = torch.tensor([120, 80, 100], dtype=torch.uint8)
    base[:, 0, 1] = 60
    batch = Batch(base, torch.zeros(200, 1, 2).byte(), 0, tuple(range(200)))
    images, _ = to_device(batch, DataConfig(jitter=0.3), 1, CPU)
    luma = images @ torch.tensor([0.299, 0.587, 0.114])
    mean = luma.mean(dim=(1, 2))
    # Undo each: the mean grey tells the brightness, its spread the contrast, the colour's spread the saturation.
    spread = (luma[:, 0, 0] - luma[:, 0, 1]) / mean
    colour = (images[:, 0, 0, 0] - images[:, 0, 0, 1]) / (luma[:, 0, 0] - luma[:, 0, 1])
    drawn = torch.stack([mean, spread, colour])
    correlation = torch.corrcoef(drawn) - torch.eye(3)
    assert correlation.abs().max() < 0.25
    assert (drawn.std(dim=1) > 0.01).all()
