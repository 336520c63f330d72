"""Recomputation: the same scores, gradients, running statistics and dropout, from less that is held."""

import pytest
import torch
from test_batchnorm import norms_of
from torch import Tensor, nn

from fcn_dist.config import ModelConfig
from fcn_dist.model import recompute
from fcn_dist.model.fcn import FCN
from fcn_dist.model.loss import summed_cross_entropy
from fcn_dist.model.recompute import recomputed

IMAGES = 5
KEYS = [11, 12, 13, 14, 15]


@pytest.fixture(params=["own", "through hooks"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for whole weights, and as for those that ZeRO-3 has taken apart, which all parameters then pass for."""
    if request.param != "own":
        monkeypatch.setattr(recompute, "PARTITIONED", "data")


def network(stages: int, images: int, **options: object) -> FCN:
    torch.manual_seed(0)
    config = ModelConfig(width=0.05, head_width=16, dropout=0.4, **options)  # type: ignore[arg-type]
    model = FCN(4, config).double().train()
    for score in (model.score_fr, model.score_pool4, model.score_pool3):
        if score is not None:
            nn.init.normal_(score.weight)
    model.recompute_stages, model.recompute_images = stages, images
    return model


def trained(model: FCN, keys: list[int] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Coarse scores and gradients of one micro-batch."""
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (IMAGES, 44, 60, 3), generator=random, dtype=torch.uint8)
    targets = torch.randint(0, 4, (IMAGES, 44, 60), generator=random, dtype=torch.uint8)
    coarse = model(pixels, coarse=True, dropout_keys=keys)
    summed_cross_entropy(coarse, targets, model.stride).backward()  # type: ignore[no-untyped-call]
    return coarse.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def held(model: FCN) -> int:
    """Bytes that backward needs of activations and pixels."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        kept.append(model(torch.zeros(IMAGES, 64, 64, 3, dtype=torch.uint8), coarse=True, dropout_keys=KEYS))
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("images", [0, 1, 2, 100])
@pytest.mark.parametrize("stages", range(1, 7))
@pytest.mark.parametrize("options", [{}, {"frozen_stages": 2}, {"variant": "fcn16s", "at_once": True}], ids=str)
def test_scores_and_gradients_are_those_without(stages: int, images: int, options: dict[str, object]) -> None:
    scores, gradients = trained(network(0, 0, **options), KEYS)
    found_scores, found = trained(network(stages, images, **options), KEYS)
    torch.testing.assert_close(found_scores, scores, rtol=1e-12, atol=1e-12)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # Sums over parts are in float32.
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("stages", [2, 6])
@pytest.mark.parametrize("frozen", [0, 1])
def test_batch_normalisation_sees_the_whole_micro_batch_and_moves_once(stages: int, frozen: int) -> None:
    plain, again = (network(n, 2, backbone="vgg16_bn", frozen_stages=frozen) for n in (0, stages))
    for _ in range(2):
        scores, gradients = trained(plain, KEYS)
        found_scores, found = trained(again, KEYS)
        torch.testing.assert_close(found_scores, scores, rtol=1e-12, atol=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
    for one, other in zip(norms_of(plain), norms_of(again), strict=True):
        assert torch.equal(one.num_batches_tracked, other.num_batches_tracked) and other.moving
        torch.testing.assert_close(one.running_mean, other.running_mean)
        torch.testing.assert_close(one.running_var, other.running_var)


@pytest.mark.usefixtures("either_way")
def test_drawn_dropout_is_replayed_too() -> None:
    results = []
    for stages in (0, 6):
        model = network(stages, 2)
        torch.manual_seed(8)
        results.append(trained(model))
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_gradients_of_many_parts_are_summed_in_float32() -> None:
    """300 ones: in bfloat16 the sum would stay at 256, whose next number is 258."""
    layer = nn.Conv2d(1, 1, 1, bias=False).bfloat16()
    x = torch.ones(300, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    torch.autograd.backward(recomputed(layer, [layer], x, 1).sum())
    assert layer.weight.grad is not None and layer.weight.grad.item() == 300
    assert x.grad is not None and torch.equal(x.grad, layer.weight.detach().expand_as(x))


def test_each_stage_that_is_recomputed_holds_less() -> None:
    sizes = [held(network(stages, 2)) for stages in range(7)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 7
    assert sizes[2] < sizes[0] / 2


def test_evaluation_recomputes_nothing() -> None:
    model = network(6, 2).eval()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.fc6.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(3, 32, 32, 3, dtype=torch.uint8))
    assert calls == 1
