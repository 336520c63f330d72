"""What a step holds by reckoning, beside what torch's allocator held in the step itself."""

import pytest
import torch
from planning_rank import most_held

from fcn_dist.model.auxiliary import add_auxiliary_heads, auxiliary_cross_entropy
from fcn_dist.model.fcn import FCN
from fcn_dist.model.loss import summed_cross_entropy
from fcn_dist.recipefile import load_recipe
from fcn_dist.training.footprint import footprint, without_content
from fcn_dist.training.memoryplan import Partition, Weights, held

OUTPUTS = 151
IMAGES = (20, 28)  # more than are rehearsed


def measured(images: int, recompute_stages: int, width: float, size: int, auxiliary: bool) -> int:
    """Bytes: parameters and gradients in float32, and all else of a forward and backward."""
    with most_held(torch.device("cpu")) as peak:
        recipe = load_recipe(None, [f"model.width={width}"])
        model = FCN(OUTPUTS, recipe.model)
        model.fc6.by_columns = model.fc7.by_columns = False  # as on a GPU
        if auxiliary:
            add_auxiliary_heads(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # as for DeepSpeed
        model.recompute_stages, model.recompute_images = recompute_stages, recipe.train.recompute_images
        pixels = torch.zeros(images, size, size, 3, dtype=torch.uint8)
        labels = torch.zeros(images, size, size, dtype=torch.uint8)
        scores, *of_heads = model(pixels, coarse=True, dropout_keys=range(images), auxiliary=True)
        loss = summed_cross_entropy(scores, labels, model.stride)
        if auxiliary:
            loss = loss + 0.4 * auxiliary_cross_entropy(of_heads, labels, 0)
        loss.backward()  # type: ignore[no-untyped-call]
    return peak.most


@pytest.mark.parametrize(("recompute_stages", "auxiliary"), [(0, False), (2, False), (3, False), (3, True)])
def test_it_grows_as_what_the_allocator_holds_beyond_the_images_that_were_rehearsed(
    recompute_stages: int, auxiliary: bool
) -> None:
    # How often a weight is laid out anew for a convolution is a matter of the CPU's instructions, not of the images.
    recipe = load_recipe(None, ["model.width=0.25", "data.crop=[128,128]", f"train.auxiliary={0.4 * auxiliary}"])
    steps = footprint(recipe, OUTPUTS, torch.float32, recompute_stages)
    weights = Weights.of(without_content(recipe.model, OUTPUTS, auxiliary))
    few, many = (held(weights, Partition(0, "float32", 1), steps.step(images)).backward for images in IMAGES)
    most = [measured(images, recompute_stages, 0.25, 128, auxiliary) for images in IMAGES]
    growth = most[1] - most[0]
    assert many - few == pytest.approx(growth, rel=0.001)


def test_jittered_pixels_are_held_in_float32_through_the_step() -> None:
    recipes = [load_recipe(None, ["model.width=0.0625", "data.crop=[32,32]", f"data.jitter={j}"]) for j in (0, 0.4)]
    plain, jittered = (footprint(recipe, 5, torch.float32, 0).step(16) for recipe in recipes)
    assert jittered.head.activations - plain.head.activations == 16 * 32 * 32 * 3 * (4 - 1)


def test_activations_grow_with_the_images_and_gradients_do_not() -> None:
    steps = footprint(load_recipe(None, ["model.width=0.0625", "data.crop=[64,64]"]), 5, torch.float32, 0)
    small, large = (steps.step(images) for images in (8, 80))
    assert large.trunk.activations == pytest.approx(10 * small.trunk.activations, rel=0.01)
    assert large.trunk.gradients == small.trunk.gradients > 0 == large.forward.gradients
