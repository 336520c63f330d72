"""Weights in: what fits is copied exactly, what does not is named, and nothing in a file runs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fcn_dist.config import ModelConfig
from fcn_dist.errors import UserError
from fcn_dist.model.fcn import FCN
from fcn_dist.model.preprocess import CAFFE, TORCHVISION
from fcn_dist.model.pretrained import load_weights, read_weights

HEAD = 6
# VGG16's convolutions as torchvision numbers them, and their channels at the smallest width.
CHANNELS = {
    0: (3, 8), 2: (8, 8), 5: (8, 8), 7: (8, 8), 10: (8, 16), 12: (16, 16), 14: (16, 16), 17: (16, 24),
    19: (24, 24), 21: (24, 24), 24: (24, 24), 26: (24, 24), 28: (24, 24),
}  # fmt: skip


def small() -> FCN:
    torch.manual_seed(0)
    return FCN(3, ModelConfig(width=0.05, head_width=HEAD))


def vgg_state(head: int = HEAD, classifier: bool = True) -> dict[str, Tensor]:
    """A VGG16 state dict under torchvision's names, at the width of `small`."""
    random = torch.Generator().manual_seed(1)
    state = {}
    for index, (inputs, outputs) in CHANNELS.items():
        state[f"features.{index}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=random)
        state[f"features.{index}.bias"] = torch.randn(outputs, generator=random)
    if classifier:
        for index, shape in {0: (head, 24 * 7 * 7), 3: (head, head), 6: (1000, head)}.items():
            state[f"classifier.{index}.weight"] = torch.randn(shape, generator=random)
            state[f"classifier.{index}.bias"] = torch.randn(shape[0], generator=random)
    return state


def test_the_trunk_and_the_classifier_go_where_they_belong() -> None:
    model, state = small(), vgg_state()
    filled = load_weights(model, state, "vgg.pth")
    assert set(filled) == {*(f"features.{index}" for index in CHANNELS), "fc6", "fc7"}
    own = model.state_dict()
    for index in CHANNELS:
        assert torch.equal(own[f"features.{index}.weight"], state[f"features.{index}.weight"])
        assert torch.equal(own[f"features.{index}.bias"], state[f"features.{index}.bias"])
    # On the 7x7 map that VGG's classifier flattens, fc6 and fc7 as convolutions give the classifier's answer.
    pooled = torch.randn(1, 24, 7, 7)
    hidden = (pooled.flatten(1) @ state["classifier.0.weight"].T + state["classifier.0.bias"]).relu()
    hidden = (hidden @ state["classifier.3.weight"].T + state["classifier.3.bias"]).relu()
    with torch.no_grad():
        found = model.eval().head(pooled, [])[:, :, 3, 3]
    torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-3)


def test_a_classifier_that_begins_with_a_layer_without_weights_is_found_as_well() -> None:
    """As in the Caffe networks that jcjohnson/pytorch-vgg has in torch's form."""
    state, moved = vgg_state(), {"classifier.0": "classifier.1", "classifier.3": "classifier.4"}
    other = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        other[f"{moved.get(layer, layer)}.{kind}"] = tensor
    assert other.keys() != state.keys()
    models = small(), small()
    assert load_weights(models[0], state, "vgg.pth") == load_weights(models[1], other, "caffe.pth")
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("state", [vgg_state(head=HEAD + 1), vgg_state(classifier=False)])
def test_a_classifier_that_is_absent_or_of_another_width_is_left_out(state: dict[str, Tensor]) -> None:
    model = small()
    before = model.fc6.weight.clone()
    filled = load_weights(model, state, "vgg.pth")
    assert "fc6" not in filled and "fc7" not in filled and len(filled) == len(CHANNELS)
    assert torch.equal(model.fc6.weight, before)


def test_a_classifier_of_another_pooling_is_not_stretched_to_fit() -> None:
    state = vgg_state() | {"classifier.0.weight": torch.ones(HEAD, 49)}
    assert "fc6" not in load_weights(small(), state, "vgg.pth")


@pytest.mark.parametrize("damage", ["missing", "wide"])
def test_a_convolution_that_is_missing_or_of_another_width_is_named(damage: str) -> None:
    model, state = small(), vgg_state()
    if damage == "missing":
        del state["features.14.weight"]
    else:
        state["features.14.weight"] = torch.zeros(20, 16, 3, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = "missing" if damage == "missing" else r"\(20, 16, 3, 3\)"
    with pytest.raises(UserError, match=rf"vgg\.pth: features\.14\.weight is {found}; \(16, 16, 3, 3\) is needed"):
        load_weights(model, state, "vgg.pth")
    # And nothing was half loaded.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# The convolutions of vgg16_bn and vgg19_bn as torchvision numbers them, each with its norm one further on.
STAGES_BN = {
    "vgg16_bn": ((0, 3), (7, 10), (14, 17, 20), (24, 27, 30), (34, 37, 40)),
    "vgg19_bn": ((0, 3), (7, 10), (14, 17, 20, 23), (27, 30, 33, 36), (40, 43, 46, 49)),
}


def small_bn(backbone: str) -> FCN:
    torch.manual_seed(0)
    return FCN(3, ModelConfig(backbone=backbone, width=0.05, head_width=HEAD))  # type: ignore[arg-type]


def vgg_bn_state(backbone: str) -> dict[str, Tensor]:
    """Its state dict under torchvision's names, at the width of `small_bn`."""
    random = torch.Generator().manual_seed(2)
    state = {name: tensor for name, tensor in vgg_state().items() if name.startswith("classifier.")}
    before = 3
    for stage, outputs in zip(STAGES_BN[backbone], (8, 8, 16, 24, 24), strict=True):
        for index in stage:
            state[f"features.{index}.weight"] = torch.randn(outputs, before, 3, 3, generator=random)
            state[f"features.{index}.bias"] = torch.randn(outputs, generator=random)
            for kind in ("weight", "bias", "running_mean", "running_var"):
                state[f"features.{index + 1}.{kind}"] = torch.rand(outputs, generator=random)
            state[f"features.{index + 1}.num_batches_tracked"] = torch.tensor(1000 + index)
            before = outputs
    return state


@pytest.mark.parametrize("backbone", STAGES_BN)
def test_batch_norm_is_loaded_with_its_running_statistics(backbone: str) -> None:
    model, state = small_bn(backbone), vgg_bn_state(backbone)
    filled = load_weights(model, state, "vgg.pth")
    convolutions = [index for stage in STAGES_BN[backbone] for index in stage]
    assert set(filled) == {f"features.{i + of}" for i in convolutions for of in (0, 1)} | {"fc6", "fc7"}
    own = model.state_dict()
    names = [name for name in state if name.startswith("features.")]
    assert len(names) == 7 * len(convolutions)
    assert all(torch.equal(own[name], state[name]) and own[name].dtype == state[name].dtype for name in names)


def test_a_file_from_before_torch_counted_batches_is_loaded() -> None:
    state = {name: t for name, t in vgg_bn_state("vgg16_bn").items() if not name.endswith("num_batches_tracked")}
    model = small_bn("vgg16_bn")
    load_weights(model, state, "vgg.pth")
    own = model.state_dict()
    assert torch.equal(own["features.41.running_var"], state["features.41.running_var"])
    assert own["features.41.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    ("backbone", "state", "message"),
    [
        ("vgg16_bn", vgg_state(), r"no running statistics .* vgg16_bn has batch norm.* model\.backbone=vgg16,"),
        ("vgg16", vgg_bn_state("vgg16_bn"), r"have running statistics .* vgg16 has no .* model\.backbone=vgg16_bn,"),
        ("vgg16_bn", vgg_bn_state("vgg19_bn"), r"features\.24\.weight is \(16,\); \(24, 16, 3, 3\) is needed"),
        ("vgg19_bn", vgg_bn_state("vgg16_bn"), r"features\.23\.weight is missing; \(16, 16, 3, 3\) is needed"),
    ],
)
def test_weights_of_another_backbone_are_refused_by_name(backbone: str, state: dict[str, Tensor], message: str) -> None:
    model = small_bn(backbone)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_weights(model, state, "vgg.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"features\.21\.running_mean is missing; \(16,\) is needed"),
        (torch.ones(8), r"features\.21\.running_mean is \(8,\); \(16,\) is needed"),
    ],
)
def test_a_statistic_that_is_missing_or_of_another_width_is_named(change: Tensor | None, message: str) -> None:
    state = vgg_bn_state("vgg16_bn")
    del state["features.21.running_mean"]
    if change is not None:
        state["features.21.running_mean"] = change
    with pytest.raises(UserError, match=message):
        load_weights(small_bn("vgg16_bn"), state, "vgg.pth")


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_running_variance_that_is_none_is_refused(value: float) -> None:
    state = vgg_bn_state("vgg16_bn")
    state["features.21.running_var"][3] = value
    with pytest.raises(UserError, match=r"features\.21\.running_var has values that are no variances"):
        load_weights(small_bn("vgg16_bn"), state, "vgg.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("convention", "expected"), [("caffe", CAFFE), ("torchvision", TORCHVISION)])
def test_a_file_is_read_with_the_convention_it_is_given(
    tmp_path: Path, suffix: str, convention: str, expected: object
) -> None:
    path, state = tmp_path / f"w{suffix}", vgg_state()
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    found, preprocessing = read_weights(path, convention)
    assert preprocessing == expected
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_a_file_that_names_its_convention_needs_no_setting_and_a_setting_wins(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(vgg_state(), path, metadata={"preprocessing": "caffe: BGR, 0-255"})
    assert read_weights(path, None)[1] == CAFFE
    assert read_weights(path, "torchvision")[1] == TORCHVISION


def test_a_file_that_does_not_say_what_it_expects_is_refused(tmp_path: Path) -> None:
    torch.save(vgg_state(), tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"w\.pth do not say which pixels .* caffe, torchvision is needed; .* model\.weights_convention"
    ):
        read_weights(tmp_path / "w.pth", None)


class Planted:
    """Unpickling this makes a file: what a hostile checkpoint would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


def test_code_in_a_pth_file_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({**vgg_state(), "extra": Planted(mark)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth are no state dict"):
        read_weights(tmp_path / "w.pth", "torchvision")
    assert not mark.exists()
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert mark.exists()  # it would have run


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_missing_or_damaged_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    with pytest.raises(UserError, match=rf"w\{suffix} cannot be read"):
        read_weights(path, "caffe")
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=rf"w\{suffix} are no state dict"):
        read_weights(path, "caffe")


def test_a_file_of_something_else_is_no_state_dict(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": vgg_state()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="no state dict"):
        read_weights(tmp_path / "w.pth", "torchvision")


@pytest.mark.real_data
def test_the_real_caffe_weights_load_and_bring_their_preprocessing(shared_data: Path) -> None:
    path = shared_data / "vgg16_conv_caffe.safetensors"
    state, preprocessing = read_weights(path, None)
    assert preprocessing.channel_order == "BGR"
    assert preprocessing.mean == (103.939, 116.779, 123.68) and preprocessing.std == (1.0, 1.0, 1.0)
    model = FCN(2, ModelConfig(variant="fcn32s", head_width=1))
    assert len(load_weights(model, state, str(path))) == 13
    stored = load_file(path)
    own = model.state_dict()
    assert all(torch.equal(own[name], stored[name]) for name in stored)


@pytest.mark.real_data
def test_the_real_weights_refuse_another_width_by_layer(shared_data: Path) -> None:
    path = shared_data / "vgg16_conv_caffe.safetensors"
    with pytest.raises(UserError, match=r"features\.0\.weight is \(64, 3, 3, 3\); \(8, 3, 3, 3\) is needed"):
        load_weights(small(), read_weights(path, None)[0], str(path))
