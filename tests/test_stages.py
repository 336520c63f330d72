"""Every ZeRO stage in every precision makes the same updates, and resumes them bit for bit."""

from pathlib import Path

import pytest
from resumed_cases import CASES, TIME_LIMIT, assert_resumed_exactly, trained_and_resumed
from test_train import RECIPE, lines, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIME_LIMIT + 100)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = RECIPE.replace("global_batch: 4", "global_batch: 4, ema: 0.25")
    return trained_and_resumed(tmp_path_factory.mktemp("runs"), recipe)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_one_that_never_stopped(case: str, runs: Path) -> None:
    """Averaged weights and all, though evaluation has put those in the place of the weights meanwhile."""
    found = assert_resumed_exactly(runs, case)
    assert any(where.endswith("/ema") for where in found)
    weights = {line["weights"] for line in lines(runs / "resumed" / case, "evaluate")}
    assert weights == {"averaged"}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-3), ("fp16", 1e-3)])
def test_stages_make_the_same_update(precision: str, tolerance: float, runs: Path) -> None:
    """Stage 0 in low precision too: DeepSpeed warms Adam up with a step that must not count, and in fp16 divides
    gradients by a scale that it did not give the loss."""
    whole = [runs / "whole" / f"{precision}-{stage}" for stage in range(4)]
    for run in whole[1:]:
        assert losses(run) == pytest.approx(losses(whole[0]), rel=tolerance)
    # Stage 0 in float32 does not tell its norm.
    norms = [[line["gradient_norm"] for line in lines(run, "train")] for run in whole[precision == "fp32" :]]
    for other in norms[1:]:
        assert other == pytest.approx(norms[0], rel=100 * tolerance)
