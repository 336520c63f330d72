"""Both ways of the evaluation benchmark give the same labels of the same scores."""

import numpy as np
import torch
from evaluation import KINDS, targets
from evaluation_ways import CLASSES, LEAST, MEAN_PIXELS, MOST, draw_scenes, label, ours, plain
from measure import Contender, Measured


def test_both_ways_give_the_same_labels() -> None:
    coarse = torch.randn(1, CLASSES, 6, 9, generator=torch.Generator().manual_seed(0))
    expected = plain(coarse, (43, 66), 8)
    found = ours(coarse, (43, 66), 8)
    assert expected.shape == (43, 66) and expected.min() >= 1 and expected.max() <= CLASSES
    assert np.array_equal(found, expected)


def test_drawn_scenes_are_of_the_benchmarks_mean_size() -> None:
    scenes = draw_scenes(60)
    pixels = [scene.truth.size for scene in scenes]
    assert all(scene.image.shape[:2] == scene.truth.shape for scene in scenes)
    assert abs(np.mean(pixels) / MEAN_PIXELS - 1) < 0.1
    assert min(pixels) > 0.9 * LEAST and max(pixels) < 1.1 * MOST


def test_what_follows_the_coarse_scores_is_a_part_of_the_whole() -> None:
    def measured(after: bool) -> dict[str, float]:
        return label("ours", None, 1, "cpu", scored=True, after=after, warmup=0, width=0.1)

    whole, part = measured(False), measured(True)
    assert np.isclose(1e3 / whole["images/s"], whole["forward ms"] + whole["following ms"])
    assert np.isclose(1e3 / part["images/s"], part["following ms"]) and whole["megapixels"] == part["megapixels"]


def test_ours_is_set_against_the_plain_way_of_the_same_kind() -> None:
    rates = {"ours": 6.0, "plain": 2.0}
    measured = {
        (kind, way): Measured(Contender(way, "", {}), [{"images/s": rate}])
        for kind in KINDS
        for way, rate in rates.items()
    }
    assert [target.found for target in targets(measured)] == [3.0] * len(KINDS)
