"""Scores, against matrices worked out by hand and the benchmark kit's own samples."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcn_dist.errors import UserError
from fcn_dist.scoring.metrics import ConfusionMatrix, Scores, score

NAMES = ("wall", "sky", "tree")

# Truth and prediction of 16 pixels. Label 0 is "other".
#
#   truth       1 1 1 1 1 1   2 2 2 2   0 0 0   2 2 1
#   prediction  1 1 1 1 2 2   2 2 2 1   1 3 2   3 0 0
TRUTH = np.array([[1, 1, 1, 1, 1, 1, 2, 2], [2, 2, 0, 0, 0, 2, 2, 1]], np.uint8)
PREDICTION = np.array([[1, 1, 1, 1, 2, 2, 2, 2], [2, 1, 1, 3, 2, 3, 0, 0]], np.uint8)


def scored(truth: object, prediction: object, names: tuple[str, ...] = NAMES, score_other: bool = False) -> Scores:
    matrix = ConfusionMatrix(len(names))
    matrix.update(np.array(truth, np.uint8), np.array(prediction, np.uint8))
    return score(matrix, names, "validation", np.zeros((1, 2), np.int64), 1, score_other)


def test_the_matrix_counts_truth_by_rows_and_prediction_by_columns() -> None:
    assert scored(TRUTH, PREDICTION).confusion.tolist() == [
        [0, 1, 1, 1],  # other, taken for each class once
        [1, 4, 2, 0],
        [1, 1, 3, 1],
        [0, 0, 0, 0],  # tree is nowhere in the truth
    ]


def test_the_official_scores_leave_true_other_out_and_count_absent_classes_as_zero() -> None:
    official = scored(TRUTH, PREDICTION).official
    # 13 labelled pixels, of which 4 + 3 are right.
    assert official.pixel_accuracy == pytest.approx(7 / 13)
    # wall: 4 right of 7 true and 5 predicted: 4 / (7 + 5 - 4). sky: 3 of 6 and 5: 3 / 8. tree: 0 of 0 and 1.
    assert official.mean_iou == pytest.approx((4 / 8 + 3 / 8 + 0) / 3)
    assert official.score == pytest.approx((7 / 13 + 7 / 24) / 2)


def test_the_paper_s_scores_without_other_skip_what_is_absent() -> None:
    paper = scored(TRUTH, PREDICTION).paper
    assert paper.pixel_accuracy == pytest.approx(7 / 13)
    # Over the classes in the truth: wall 4 of 7, sky 3 of 6.
    assert paper.mean_accuracy == pytest.approx((4 / 7 + 3 / 6) / 2)
    # tree was predicted at a labelled pixel, so it is present and wrong: 0.
    assert paper.mean_iu == pytest.approx((4 / 8 + 3 / 8 + 0) / 3)
    assert paper.frequency_weighted_iu == pytest.approx((7 * 4 / 8 + 6 * 3 / 8) / 13)


def test_the_paper_s_scores_with_other_treat_it_as_a_class() -> None:
    result = scored(TRUTH, PREDICTION, score_other=True)
    # All 16 pixels count. other: 0 right of 3 true and 2 predicted; wall: 4 of 7 and 6; sky: 3 of 6 and 6; tree: 0
    # of 0 and 2.
    assert result.paper.pixel_accuracy == pytest.approx(7 / 16)
    assert result.paper.mean_accuracy == pytest.approx((0 + 4 / 7 + 3 / 6) / 3)
    assert result.paper.mean_iu == pytest.approx((0 + 4 / 9 + 3 / 9 + 0) / 4)
    assert result.paper.frequency_weighted_iu == pytest.approx((3 * 0 + 7 * 4 / 9 + 6 * 3 / 9) / 16)
    # The benchmark's rule does not depend on what the network was trained on.
    assert result.official == scored(TRUTH, PREDICTION).official


def test_a_class_that_is_nowhere_is_zero_officially_and_skipped_by_the_paper() -> None:
    result = scored([1, 1, 2, 0], [1, 1, 2, 3])  # tree is predicted on "other" alone
    assert result.official.mean_iou == pytest.approx(2 / 3)
    assert result.paper.mean_iu == 1.0 and result.paper.mean_accuracy == 1.0
    assert result.paper.frequency_weighted_iu == 1.0
    assert [c.iou for c in result.classes] == [1.0, 1.0, None]
    assert [c.accuracy for c in result.classes] == [1.0, 1.0, None]


def test_each_class_has_its_own_line() -> None:
    wall, sky, tree = scored(TRUTH, PREDICTION).classes
    assert (wall.label, wall.name, wall.truth_pixels, wall.predicted_pixels) == (1, "wall", 7, 5)
    assert [wall.iou, wall.accuracy] == pytest.approx([4 / 8, 4 / 7])
    assert (sky.label, sky.name, sky.truth_pixels, sky.predicted_pixels) == (2, "sky", 6, 5)
    assert [sky.iou, sky.accuracy] == pytest.approx([3 / 8, 3 / 6])
    # The tree predicted on "other" is not counted; the one at a labelled pixel is.
    assert (tree.truth_pixels, tree.predicted_pixels, tree.iou, tree.accuracy) == (0, 1, 0.0, None)


@pytest.mark.parametrize("score_other", [False, True])
@pytest.mark.parametrize("truth", [[], [0, 0]])
def test_nothing_labelled_scores_zero_and_not_nan(truth: list[int], score_other: bool) -> None:
    result = scored(truth, [1] * len(truth), score_other=score_other)
    assert vars(result.official) == {"pixel_accuracy": 0.0, "mean_iou": 0.0, "score": 0.0}
    assert all(value == 0.0 for value in vars(result.paper).values())


@pytest.mark.parametrize(("truth", "prediction", "kind"), [([4], [1], "annotation"), ([1], [4], "prediction")])
def test_a_label_above_n_is_refused_naming_it(truth: list[int], prediction: list[int], kind: str) -> None:
    with pytest.raises(UserError, match=rf"an? {kind} holds label 4; labels 0\.\.3 are needed"):
        scored(truth, prediction)


def test_arrays_of_two_shapes_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        scored([[1, 1]], [1, 1])


def test_255_classes_are_counted_without_overflow() -> None:
    truth = np.arange(256, dtype=np.uint8)
    result = scored(truth, truth, tuple(str(n) for n in range(1, 256)))
    assert result.confusion.shape == (256, 256) and (np.diag(result.confusion) == 1).all()
    assert result.official.pixel_accuracy == 1.0


pixels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=60)


@given(pixels, pixels)
@settings(max_examples=60)
def test_parts_added_up_are_the_whole(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    matrix = ConfusionMatrix(3)
    for part in (one, other):
        matrix.update(np.array([t for t, _ in part], np.uint8), np.array([p for _, p in part], np.uint8))
    both = one + other
    expected = [[both.count((t, p)) for p in range(4)] for t in range(4)]
    assert matrix.counts.tolist() == expected


@given(pixels, st.booleans())
@settings(max_examples=100)
def test_scores_agree_with_counting_pixel_by_pixel(both: list[tuple[int, int]], score_other: bool) -> None:
    result = scored([t for t, _ in both], [p for _, p in both], score_other=score_other)
    labelled = [(t, p) for t, p in both if t != 0]

    def iou(pairs: list[tuple[int, int]], label: int) -> float | None:
        union = sum(t == label or p == label for t, p in pairs)
        return sum(t == p == label for t, p in pairs) / union if union else None

    assert [c.iou for c in result.classes] == [pytest.approx(iou(labelled, label)) for label in (1, 2, 3)]
    assert result.official.mean_iou == pytest.approx(sum(iou(labelled, label) or 0 for label in (1, 2, 3)) / 3)
    counted, labels = (both, range(4)) if score_other else (labelled, range(1, 4))
    present = [value for label in labels if (value := iou(counted, label)) is not None]
    assert result.paper.mean_iu == pytest.approx(sum(present) / max(1, len(present)))
    weighted = sum(iou(counted, t) or 0 for t, _ in counted) / max(1, len(counted))
    assert result.paper.frequency_weighted_iu == pytest.approx(weighted)


def test_the_json_form_names_both_families() -> None:
    values = scored(TRUTH, PREDICTION).as_dict()
    assert set(values["official"]) == {"pixel_accuracy", "mean_iou", "score"}
    assert set(values["paper"]) == {"pixel_accuracy", "mean_accuracy", "mean_iu", "frequency_weighted_iu"}
    assert values["split"] == "validation" and values["num_samples"] == 1
    assert len(values["classes"]) == 3 and np.array(values["confusion"]).sum() == 16


@pytest.mark.real_data
def test_the_benchmark_kit_s_samples_scored_against_themselves_give_its_published_figures(shared_data: Path) -> None:
    folder = shared_data / "ade20k" / "annotations" / "validation"
    matrix = ConfusionMatrix(150)
    for number in (1, 2, 3):
        labels = cv2.imread(str(folder / f"ADE_val_{number:08d}.png"), cv2.IMREAD_UNCHANGED)
        assert labels is not None
        matrix.update(labels.astype(np.uint8), labels.astype(np.uint8))
    result = score(matrix, tuple(str(n) for n in range(1, 151)), "validation", np.zeros((3, 2), np.int64), 3, False)
    assert result.official.pixel_accuracy == 1.0
    assert result.official.mean_iou == 0.1  # 15 of the 150 classes occur
    assert sum(c.iou is not None for c in result.classes) == 15
    assert result.paper.mean_iu == 1.0
