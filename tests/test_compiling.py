"""train.compile: what torch.compile makes of the network trains as it does, or is refused with the reason."""

import json
from pathlib import Path

import pytest
import torch
from launching import run_ranks
from test_recompute import KEYS, network, trained
from test_train import RECIPE, TIME_LIMIT, TRAIN, arguments, config_with, losses, weights, zero_config

from fcn_dist.errors import UserError
from fcn_dist.training.compiling import compile_network

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "images", "options"),
    [(0, 0, {}), (3, 2, {"frozen_stages": 1}), (2, 0, {"backbone": "vgg16_bn"})],
    ids=["plain", "recomputed", "batch norm"],
)
def test_scores_gradients_and_statistics_are_those_of_the_network_as_it_is(
    stages: int, images: int, options: dict[str, object]
) -> None:
    plain, compiled = (network(stages, images, **options) for _ in range(2))
    torch._dynamo.reset()
    compile_network(compiled, 1, CPU)
    counted = torch._dynamo.utils.counters["frames"]
    assert list(compiled.state_dict()) == list(plain.state_dict())
    (scores, gradients), (wanted, wanted_gradients) = trained(compiled, KEYS), trained(plain, KEYS)
    assert counted["ok"] >= 5, "a function for each stage"
    torch.testing.assert_close(scores, wanted, rtol=1e-9, atol=1e-12)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-7, atol=1e-8)
    for name, buffer in compiled.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name), rtol=1e-5, atol=1e-7)
    before = counted["total"]
    with torch.no_grad():
        for size in (40, 56):
            pixels = torch.zeros(1, size, size, 3, dtype=torch.uint8)
            torch.testing.assert_close(compiled.eval()(pixels), plain.eval()(pixels), rtol=1e-5, atol=1e-7)
    assert counted["total"] == before, "images that are evaluated are of many sizes"


@pytest.mark.slow
def test_a_run_that_compiles_trains_the_same(shards: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    config = config_with(tmp_path, zero_config(1), gradient_accumulation_steps=2)
    for name in ("true", "false"):
        more = ["--set", f"train.compile={name}", "--set", "evaluate.at_end=true"]
        run_ranks(TRAIN, arguments(shards, tmp_path / name, recipe, config, *more), 2, tmp_path, TIME_LIMIT)
    assert json.loads((tmp_path / "true" / "run.json").read_text())["recipe"]["train"]["compile"] is True
    compiled, plain = tmp_path / "true", tmp_path / "false"
    assert losses(compiled) == pytest.approx(losses(plain), rel=2e-5) and len(losses(plain)) == 4
    expected = weights(plain, tmp_path)
    for key, tensor in weights(compiled, tmp_path).items():
        assert float((tensor - expected[key]).abs().max()) < 1e-4, key


def test_zero_3_and_a_compiler_that_fails_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"train\.compile is true and zero_optimization\.stage is 3, .*; take stage 0,"):
        compile_network(network(0, 0), 3, CPU)

    def no_compiler(*arguments: object, **options: object) -> object:
        raise RuntimeError("no C++ compiler found\nset CXX")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(UserError, match=r"torch\.compile fails on cpu: no C\+\+ compiler found; install .* to false"):
        compile_network(network(0, 0), 1, CPU)
