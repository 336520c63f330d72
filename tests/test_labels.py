"""Labels, against the two rules as DESIGN states them."""

import pytest

from fcn_dist.errors import UserError
from fcn_dist.labels import IGNORE_LABEL, LabelRule


def test_other_is_ignored_and_the_classes_are_outputs_0_to_n_minus_1() -> None:
    rule = LabelRule(3)
    assert rule.num_outputs == 3
    assert list(rule.target_table[:5]) == [255, 0, 1, 2, 255]
    assert list(rule.label_table[:4]) == [1, 2, 3, 0]


def test_other_is_output_0_under_the_tensorflow_rule() -> None:
    rule = LabelRule(3, score_other=True)
    assert rule.num_outputs == 4
    assert list(rule.target_table[:5]) == [0, 1, 2, 3, 255]
    assert list(rule.label_table[:5]) == [0, 1, 2, 3, 0]


@pytest.mark.parametrize(("classes", "score_other"), [(1, False), (1, True), (150, False), (254, True), (255, False)])
def test_every_scored_label_survives_the_way_there_and_back(classes: int, score_other: bool) -> None:
    rule = LabelRule(classes, score_other)
    assert len(rule.target_table) == len(rule.label_table) == 256
    for label in range(0 if score_other else 1, classes + 1):
        assert rule.target_table[label] < rule.num_outputs
        assert rule.label_table[rule.target_table[label]] == label


@pytest.mark.parametrize("score_other", [False, True])
def test_labels_above_n_are_ignored_and_never_a_class(score_other: bool) -> None:
    table = LabelRule(150, score_other).target_table
    assert set(table[151:]) == {IGNORE_LABEL}


def test_only_ignored_pixels_have_the_ignore_label() -> None:
    # 255 classes without "other" use targets 0..254: one more would make a class out of IGNORE_LABEL.
    assert LabelRule(255).target_table.count(IGNORE_LABEL) == 1
    assert IGNORE_LABEL not in LabelRule(254, score_other=True).target_table[:255]


@pytest.mark.parametrize(
    ("classes", "score_other", "most"), [(0, False, 255), (-1, False, 255), (256, False, 255), (255, True, 254)]
)
def test_a_class_count_that_bytes_cannot_hold_is_refused_with_the_limit(
    classes: int, score_other: bool, most: int
) -> None:
    with pytest.raises(UserError, match=rf"{classes} classes .* between 1 and {most} are needed"):
        LabelRule(classes, score_other)
