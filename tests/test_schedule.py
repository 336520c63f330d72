"""Learning rates and parameter groups, against values worked out by hand."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcn_dist.config import ModelConfig, ScheduleConfig
from fcn_dist.errors import UserError
from fcn_dist.model.fcn import FCN
from fcn_dist.training.schedule import check_warmup, learning_rate, parameter_groups, total_steps


def rates(config: ScheduleConfig, steps: int, peak: float = 0.1) -> list[float]:
    return [learning_rate(config, peak, step, steps) for step in range(steps)]


def test_constant_stays_at_the_peak() -> None:
    assert rates(ScheduleConfig(steps=5, kind="constant"), 5) == [0.1] * 5


def test_poly_falls_as_caffe_s_does() -> None:
    # base * (1 - iter / max_iter) ^ power
    expected = [0.1, 0.1 * 0.75**0.9, 0.1 * 0.5**0.9, 0.1 * 0.25**0.9]
    assert rates(ScheduleConfig(steps=4), 4) == pytest.approx(expected)
    assert rates(ScheduleConfig(steps=4, power=2), 4) == pytest.approx([0.1, 0.05625, 0.025, 0.00625])


def test_cosine_falls_along_half_a_wave() -> None:
    # Angles 0, 45, 90 and 135 degrees: (1 + cos) / 2.
    expected = [0.1, 0.1 * (2 + math.sqrt(2)) / 4, 0.05, 0.1 * (2 - math.sqrt(2)) / 4]
    assert rates(ScheduleConfig(steps=4, kind="cosine"), 4) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["constant", "poly", "cosine"])
def test_warm_up_rises_evenly_to_the_peak_where_the_schedule_begins(kind: str) -> None:
    config = ScheduleConfig(steps=10, kind=kind, warmup_steps=4)  # type: ignore[arg-type]
    found = rates(config, 10)
    assert found[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert found[4] == pytest.approx(0.1)
    later = rates(ScheduleConfig(steps=6, kind=kind), 6)  # type: ignore[arg-type]
    assert found[4:] == pytest.approx(later)


@pytest.mark.parametrize("kind", ["poly", "cosine"])
def test_the_final_fraction_is_where_the_schedule_ends(kind: str) -> None:
    config = ScheduleConfig(steps=4, kind=kind, final_fraction=0.2)  # type: ignore[arg-type]
    assert learning_rate(config, 0.1, 4, 4) == pytest.approx(0.02)
    assert learning_rate(config, 0.1, 0, 4) == pytest.approx(0.1)
    assert all(0.02 < rate <= 0.1 for rate in rates(config, 4))
    long = rates(ScheduleConfig(steps=5000, kind=kind, final_fraction=0.2), 5000)  # type: ignore[arg-type]
    assert long[-1] == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("kind", ["constant", "poly", "cosine"])
def test_every_rate_is_positive_and_none_rises_after_the_warm_up(kind: str) -> None:
    for steps in (1, 2, 3, 100):
        found = rates(ScheduleConfig(steps=steps, kind=kind), steps)  # type: ignore[arg-type]
        assert all(rate > 0 for rate in found)
        assert found == sorted(found, reverse=True)


def test_steps_are_counted_as_given_or_rounded_up_from_epochs() -> None:
    assert total_steps(ScheduleConfig(steps=7), 100, 4) == 7
    assert total_steps(ScheduleConfig(epochs=3), 10, 4) == 8  # 30 samples in batches of 4
    assert total_steps(ScheduleConfig(epochs=0.5), 10, 5) == 1
    assert total_steps(ScheduleConfig(epochs=2.2), 25, 1) == 55  # 2.2 * 25 is 55.00000000000001 in floating point


@given(st.integers(1, 500), st.integers(1, 100_000), st.integers(1, 512))
@settings(max_examples=100)
def test_epochs_in_tenths_give_exactly_the_steps_they_say(tenths: int, samples: int, batch: int) -> None:
    expected = math.ceil(Fraction(tenths * samples, 10 * batch))
    assert total_steps(ScheduleConfig(epochs=tenths / 10), samples, batch) == expected


@pytest.mark.parametrize(("warmup", "steps"), [(5, 5), (6, 5), (1, 1)])
def test_a_warm_up_without_an_end_is_refused_with_both_numbers(warmup: int, steps: int) -> None:
    with pytest.raises(UserError, match=rf"warmup_steps is {warmup}, and the run has {steps} steps"):
        check_warmup(ScheduleConfig(steps=steps, warmup_steps=warmup), steps)
    check_warmup(ScheduleConfig(steps=steps, warmup_steps=warmup), warmup + 1)


@pytest.mark.parametrize("variant", ["fcn8s", "fcn16s", "fcn32s"])
def test_the_groups_hold_every_parameter_once_by_part_and_kind(variant: str) -> None:
    model = FCN(3, ModelConfig(variant=variant, width=0.05, head_width=8))  # type: ignore[arg-type]
    groups = parameter_groups(model, ScheduleConfig(steps=1))
    assert [group.name for group in groups] == ["trunk_weights", "trunk_biases", "head_weights", "head_biases"]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {group.name: [names[id(parameter)] for parameter in group.parameters] for group in groups}
    assert sorted(name for group in found.values() for name in group) == sorted(names.values())
    for group, members in found.items():
        assert members
        for name in members:
            assert group.startswith("trunk_") == name.startswith("features.")
            assert group.endswith("_biases") == name.endswith(".bias")


def test_biases_do_not_decay_unless_asked_and_multipliers_multiply() -> None:
    model = FCN(3, ModelConfig(width=0.05, head_width=8))
    plain = parameter_groups(model, ScheduleConfig(steps=1))
    assert [(group.multiplier, group.decays) for group in plain] == [(1, True), (1, False), (1, True), (1, False)]
    config = ScheduleConfig(steps=1, head_multiplier=10, bias_multiplier=2, decay_biases=True)
    asked = parameter_groups(model, config)
    assert [(group.multiplier, group.decays) for group in asked] == [(1, True), (2, True), (10, True), (20, True)]


def test_what_is_frozen_is_in_no_group_and_no_group_is_empty() -> None:
    """DeepSpeed drops empty groups; the learning rates, given by position, would then go to the wrong ones."""
    config = ScheduleConfig(steps=1, head_multiplier=3)
    model = FCN(3, ModelConfig(width=0.0625, head_width=8, frozen_stages=5))
    groups = parameter_groups(model, config)
    assert [(group.name, group.multiplier) for group in groups] == [("head_weights", 3.0), ("head_biases", 3.0)]
    assert [len(group.parameters) for group in groups] == [5, 5]
