"""Labels and scores from Python, and the files that the command writes."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny_models import DESCRIPTION, tiny_network

from fcn_dist.commands import predict as command
from fcn_dist.commands.entry import run_script
from fcn_dist.deploy import imagefiles, jobs
from fcn_dist.deploy.imagefiles import read_rgb
from fcn_dist.deploy.modelfile import write_model_file
from fcn_dist.deploy.predict import Predictor
from fcn_dist.errors import UserError
from fcn_dist.model import inference
from fcn_dist.model.views import Views
from fcn_dist.model.winograd import WinogradConv2d

ORIENTATION = 0x0112  # the EXIF tag


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    write_model_file(path, tiny_network().state_dict(), DESCRIPTION, {"run": "test"})
    return path


@pytest.fixture(scope="module")
def predictor(model: Path) -> Predictor:
    return Predictor.from_file(model, device="cpu", precision="float32")


def pixels(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Patches of colour, so that several classes win."""
    patches = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    return patches.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (31, 1), (32, 32), (45, 83), (128, 200)])
def test_labels_are_the_best_output_of_the_network_plus_one(predictor: Predictor, size: tuple[int, int]) -> None:
    image = pixels(*size)
    with torch.inference_mode():
        wanted = tiny_network()(torch.from_numpy(image.copy()).unsqueeze(0))[0].numpy()
    scores, labels = predictor.scores(image), predictor.predict(image)
    assert scores.shape == (5, *size) and scores.dtype == np.float32
    assert labels.shape == size and labels.dtype == np.uint8
    assert np.allclose(scores, wanted, atol=1e-5 * abs(wanted).max())
    # Where two classes are as good as equal, either is right.
    best = np.take_along_axis(wanted, labels[None].astype(int) - 1, axis=0)[0]
    assert labels.min() >= 1 and (best >= wanted.max(axis=0) - 1e-5).all()


def test_large_convolutions_are_computed_as_for_inference(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "WINOGRAD_FROM", 1)
    image = pixels(45, 83)
    with torch.inference_mode():
        wanted = tiny_network()(torch.from_numpy(image.copy()).unsqueeze(0))[0].numpy()
    with patch.object(WinogradConv2d, "forward", autospec=True, side_effect=WinogradConv2d.forward) as forward:
        found = Predictor.from_file(model, "cpu", "float32").scores(image)
    assert forward.call_count == 14
    assert np.allclose(found, wanted, atol=3e-5 * abs(wanted).max())


def test_labels_differ_within_an_image(predictor: Predictor) -> None:
    assert len(np.unique(predictor.predict(pixels(128, 200)))) > 1


def test_a_model_that_scores_label_0_predicts_it(tmp_path: Path) -> None:
    description = replace(DESCRIPTION, score_other=True)
    network = tiny_network(description)
    network.get_parameter("score_fr.bias").data[0] = 100.0
    write_model_file(tmp_path / "m.safetensors", network.state_dict(), description, {})
    predictor = Predictor.from_file(tmp_path / "m.safetensors", "cpu")
    assert predictor.scores(pixels(8, 8)).shape == (6, 8, 8)
    assert (predictor.predict(pixels(8, 8)) == 0).all()


def test_classes_and_colours_are_those_of_labels_1_to_n(predictor: Predictor) -> None:
    assert predictor.classes == DESCRIPTION.classes
    assert predictor.colours == DESCRIPTION.colours


def test_views_and_read_only_arrays_are_images_too(predictor: Predictor) -> None:
    image = pixels(40, 50)
    wanted = predictor.predict(np.ascontiguousarray(image[::-1, ::2]))
    frozen = image.copy()
    frozen.flags.writeable = False
    assert (predictor.predict(frozen[::-1, ::2]) == wanted).all()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        [[[1, 2, 3]]],
    ],
)
@pytest.mark.parametrize("method", ["predict", "scores"])
def test_what_is_no_rgb_image_is_refused_with_what_is_needed(predictor: Predictor, method: str, image: Any) -> None:
    with pytest.raises(ValueError, match=r"needed: .*np\.asarray"):
        getattr(predictor, method)(image)


@pytest.mark.parametrize("device", ["meta", "abacus", "cuda:99", ""])
def test_a_device_that_is_not_there_is_named(model: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"device '{device}' cannot be used"):
        Predictor.from_file(model, device)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_in_16_bits_labels_are_nearly_the_same(model: Path, predictor: Predictor, precision: str) -> None:
    other = Predictor.from_file(model, "cpu", precision)
    image = pixels(128, 200)
    wanted, scores = predictor.scores(image), other.scores(image)
    assert scores.dtype == np.float32
    assert 0 < np.abs(scores - wanted).max() < 0.06 * np.abs(wanted).max()
    assert (other.predict(image) == predictor.predict(image)).mean() > 0.97


@pytest.mark.parametrize(
    ("flag", "precision"), [("amx_bf16", "bfloat16"), ("avx512_bf16", "bfloat16"), ("avx2", "float32")]
)
def test_bfloat16_is_taken_where_the_cpu_multiplies_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, flag: str, precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True})
    assert Predictor.from_file(model, "cpu").precision == precision


def test_several_looks_give_labels_with_their_probability(model: Path, predictor: Predictor) -> None:
    image = pixels(60, 90)
    labels, confidence = predictor.predict_with_confidence(image)
    assert (labels == predictor.predict(image)).mean() > 0.99
    wanted = torch.from_numpy(predictor.scores(image)).softmax(0).amax(0).numpy()
    assert np.allclose(confidence, wanted, atol=1e-4) and confidence.dtype == np.float32
    several = Predictor.from_file(model, "cpu", "float32", Views(flip=True, scales=(1.0, 0.5)))
    mirrored = np.ascontiguousarray(image[:, ::-1])
    assert (several.predict(image) == several.predict(mirrored)[:, ::-1]).mean() > 0.99
    assert (several.predict(image) != labels).any()


def test_a_precision_that_is_none_is_named(model: Path) -> None:
    with pytest.raises(UserError, match=r"precision is 'int8'; one of auto, float32, bfloat16, float16 is needed"):
        Predictor.from_file(model, "cpu", "int8")


@pytest.mark.gpu
def test_a_gpu_labels_as_the_cpu_does(model: Path, predictor: Predictor) -> None:
    image = pixels(128, 200)
    differ = Predictor.from_file(model, "cuda", "float32").predict(image) != predictor.predict(image)
    assert differ.mean() < 0.01


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "1", "LA", "I;16"])
def test_every_mode_of_picture_is_read_as_the_same_rgb(tmp_path: Path, mode: str) -> None:
    gray = np.array([[0, 255], [0, 255]], np.uint8)
    if mode == "I;16":
        gray[1] = (3, 100)
        image = Image.fromarray(gray.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(gray).convert("RGB").convert(mode)
    image.save(tmp_path / "x.tif")
    assert (read_rgb(tmp_path / "x.tif") == gray[..., None]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_seen_on_white(tmp_path: Path, mode: str) -> None:
    gray = np.array([[200, 50, 50]], np.uint8)
    alpha = np.array([[255, 0, 0 if mode == "P" else 51]], np.uint8)
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1, 1]], np.uint8))
        image.putpalette([200] * 3 + [50] * 3)
        image.info["transparency"] = 1
    else:
        image = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)]).convert(mode)
    image.save(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").mode == mode
    seen = 255 + (gray.astype(int) - 255) * alpha / 255
    assert np.abs(read_rgb(tmp_path / "x.png").astype(int) - seen[..., None]).max() <= 1


@pytest.mark.parametrize("marked", [True, False])
def test_inks_of_cmyk_jpegs_are_counted_as_adobe_does_with_its_marker_or_without(tmp_path: Path, marked: bool) -> None:
    inks = np.full((16, 16, 4), (0, 255, 255, 0), np.uint8)  # magenta and yellow: red
    inks[:, 8:] = (255, 0, 0, 128)
    path = tmp_path / "x.jpg"
    Image.fromarray(inks, "CMYK").save(path, quality=100)  # in the file, 255 is no ink
    content = path.read_bytes()
    start = content.index(b"\xff\xee")
    if not marked:
        path.write_bytes(content[:start] + content[start + 2 + int.from_bytes(content[start + 2 : start + 4], "big") :])
    found = read_rgb(path).astype(int)
    assert np.abs(found[:, :7] - (255, 0, 0)).max() <= 4
    assert np.abs(found[:, 9:] - (0, 127, 127)).max() <= 4


@pytest.mark.parametrize("end", [".png", ".tif"])
def test_sixteen_bits_a_channel_keep_the_upper_eight(tmp_path: Path, end: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (6, 7, 3)).astype(np.uint16)
    assert cv2.imwrite(str(tmp_path / f"x{end}"), values[..., ::-1])
    assert np.abs(read_rgb(tmp_path / f"x{end}") - values / 257).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_by_their_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = pixels(16, 24)
    # What a camera stores so that its orientation tag makes it upright again (EXIF 2.3, table 6).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.png", exif=exif)
    assert (read_rgb(tmp_path / "x.png") == upright).all()


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_of_32_bits_are_refused_rather_than_shown_black(tmp_path: Path, mode: str) -> None:
    Image.fromarray(pixels(8, 8)).convert("L").convert(mode).save(tmp_path / "x.tiff")
    with pytest.raises(UserError, match="holds numbers of 32 bits"):
        read_rgb(tmp_path / "x.tiff")


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(pixels(30, 40)).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:60])  # the header is whole, no pixel is
    monkeypatch.setattr(imagefiles, "MAX_PIXELS", 1000)
    with pytest.raises(UserError, match="is 40x30; at most 1,000 pixels"):
        read_rgb(tmp_path / "x.png")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with an image, and one in a folder within, its stem with dots."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(pixels(40, 60)).save(folder / "one.jpg")
    Image.fromarray(pixels(24, 30, seed=1)).convert("L").save(folder / "sub" / "two.a.b.PNG")
    (folder / "notes.txt").write_text("no image")
    return folder


def run(model: Path, *arguments: str | Path) -> None:
    """As the fixture predicts, on whatever processor."""
    command.main([str(model), *map(str, arguments), "--device", "cpu", "--precision", "float32"])


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def lines_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The record's objects by the names of their images."""
    found = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len({one["image"] for one in found}) == len(found)
    return {Path(one["image"]).name: one for one in found}


def test_a_folder_gives_two_files_an_image_at_the_same_place_and_a_line_each(
    model: Path, predictor: Predictor, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(model, images, "--output", out, "--json", out / "all.json")
    (out / "all.json").rename(tmp_path / "all.json")
    stems = ("one", "sub/two.a.b")
    assert written(out) == sorted(
        ["predictions.jsonl", *(f"{s}{end}" for s in stems for end in (".png", "_overlay.png"))]
    )
    with Image.open(out / "one.png") as labels:
        assert labels.mode == "L"
        found = np.asarray(labels)
    assert (found == predictor.predict(read_rgb(images / "one.jpg"))).all()
    with Image.open(out / "one_overlay.png") as overlay:
        assert overlay.mode == "RGB" and overlay.width >= 60 and overlay.height >= 40
    figures = lines_of(out)["one.jpg"]
    assert (figures["width"], figures["height"], figures["model"]) == (60, 40, "tiny.safetensors")
    assert figures["outputs"] == [str(out / "one.png"), str(out / "one_overlay.png")]
    first = figures["classes"][0]
    assert first["pixels"] == (found == first["label"]).sum() == round(first["share"] * 2400)
    assert first["name"] == DESCRIPTION.classes[first["label"] - 1]
    assert sum(entry["pixels"] for entry in figures["classes"]) == 2400
    summary = json.loads((tmp_path / "all.json").read_text())
    assert {entry["image"] for entry in summary["images"]} == {
        str(images / "one.jpg"),
        str(images / "sub" / "two.a.b.PNG"),
    }
    printed = capsys.readouterr()
    assert "2 images labelled on cpu" in printed.out and DESCRIPTION.classes[first["label"] - 1] in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jpg", ["one"]),
        ("**/*.PNG", ["sub/two.a.b"]),
        ("**", ["one", "sub/two.a.b"]),
        ("s*/t*", ["sub/two.a.b"]),
        ("[a-z]ub/*", ["sub/two.a.b"]),
    ],
)
def test_a_pattern_keeps_the_folders_after_its_first_wildcard(
    model: Path, images: Path, tmp_path: Path, pattern: str, names: list[str]
) -> None:
    out = tmp_path / "out"
    run(model, f"{images}/{pattern}", "--output", out)
    found = [name for name in written(out) if name.endswith("_overlay.png")]
    assert found == [f"{name}_overlay.png" for name in names]


def test_what_is_no_image_by_its_name_is_told_of(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "sub" / "three.heic").write_bytes(b"")
    (images / ".hidden.txt").write_text("")
    run(model, images, "--output", tmp_path / "out")
    printed = " ".join(capsys.readouterr().out.split())
    assert f"passed over 2 files, by name no images: {images}/notes.txt, {images}/sub/three.heic" in printed
    (images / "one.jpg").rename(images / "one.img")  # which is named, so that it is none of them
    run(model, images / "one.img", "--output", tmp_path / "named", images)
    printed = " ".join(capsys.readouterr().out.split())
    assert "passed over 2 files" in printed and "one.img" in lines_of(tmp_path / "named")
    (images / "one.img").rename(images / "one.jpg")
    run(model, images / "one.jpg", "--output", tmp_path / "one", images / "sub" / "two.a.b.PNG")  # in any order
    assert "passed over" not in capsys.readouterr().out and len(lines_of(tmp_path / "one")) == 2


def test_folders_behind_links_are_entered_once(model: Path, images: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.fromarray(pixels(8, 8)).save(elsewhere / "three.png")
    for link, target in [("away", elsewhere), ("zaway", elsewhere), ("back", images), ("again", images / "sub")]:
        (images / link).symlink_to(target)
    (elsewhere / "round").symlink_to(images)
    run(model, images, "--output", tmp_path / "out")
    found = [name for name in written(tmp_path / "out") if name.endswith("_overlay.png")]
    assert found == ["away/three_overlay.png", "one_overlay.png", "sub/two.a.b_overlay.png"]


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(model: Path, images: Path, tmp_path: Path) -> None:
    (images / "gone.png").symlink_to(tmp_path / "nothing")
    (images / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"1 of 3 images .*gone\.png cannot be decoded \(No such file or directory\)"):
        run(model, images, "--output", tmp_path / "out")
    assert len(lines_of(tmp_path / "out")) == 3


def test_a_folder_that_cannot_be_read_is_refused(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def scan(path: Any) -> Any:
        if Path(path).name == "sub":  # for root, all can be read
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(UserError, match=r"images/sub cannot be read \(Permission denied\)"):
        run(model, images, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_with_a_wildcard_in_its_name_is_a_file(model: Path, images: Path, tmp_path: Path) -> None:
    (images / "one.jpg").rename(images / "one[1].jpg")
    run(model, images / "one[1].jpg", "--output", tmp_path / "out")
    assert (tmp_path / "out" / "one[1].png").is_file()


def test_an_image_that_several_inputs_name_is_labelled_once(model: Path, images: Path, tmp_path: Path) -> None:
    again = [images / "*.jpg", images / "one.jpg", images / "sub" / ".." / "one.jpg"]
    run(model, images, *again, "--output", tmp_path / "out")
    assert len(lines_of(tmp_path / "out")) == 2


def test_images_of_one_size_are_computed_together_and_labelled_as_one_by_one(
    predictor: Predictor, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(40, 56), (33, 20), (40, 56), (40, 56), (33, 20), (8, 8)]
    photos = [pixels(*size, seed=seed) for seed, size in enumerate(sizes)]
    for found, photo in zip(predictor.predict_many(photos), photos, strict=True):
        assert (found == predictor.predict(photo)).all()
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, photo in enumerate(photos):
        Image.fromarray(photo).save(folder / f"{number}.png")
    monkeypatch.setattr(command, "TOGETHER", 2 * 40 * 56)
    several = Predictor.predict_many
    together = patch.object(Predictor, "predict_many", autospec=True, side_effect=several)
    with together as predict_many:
        run(model, folder, "--output", tmp_path / "out", "--precision", "float32")
    assert sorted(len(call.args[1]) for call in predict_many.call_args_list) == [1, 1, 2, 2]
    for number, photo in enumerate(photos):
        assert (np.asarray(Image.open(tmp_path / "out" / f"{number}.png")) == predictor.predict(photo)).all()
    assert predictor.predict_many([]) == []


def test_images_do_not_wait_beyond_a_bound(model: Path, images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(command, "WAITING", 100)
    waiting: list[int] = []
    finish = command.Labelling.finish

    def count(self: Any) -> None:
        waiting.append(len(self._waiting))
        finish(self)

    monkeypatch.setattr(command.Labelling, "finish", count)
    run(model, images, "--output", tmp_path / "out")
    assert waiting == [1, 1, 0]


def test_what_was_labelled_before_a_kill_has_whole_lines(model: Path, images: Path, tmp_path: Path) -> None:
    for number in range(40):
        shutil.copy(images / "one.jpg", images / f"more{number:02}.jpg")
    out = tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "from fcn_dist.commands import predict\n"
        "write, seen = predict.write_png, []\n"
        "def killing(path, picture):\n"
        "    write(path, picture)\n"
        "    seen.append(path)\n"
        "    if len(seen) == 30: os.kill(os.getpid(), signal.SIGKILL)\n"
        "predict.write_png = killing\n"
        "predict.main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(images), "--output", str(out), "--device", "cpu"], check=False
    )
    assert done.returncode == -signal.SIGKILL
    lines = lines_of(out)
    assert len(lines) == 29
    for figures in lines.values():
        assert all(Path(path).is_file() for path in figures["outputs"])


@pytest.mark.parametrize("how", ["hardlink_to", "symlink_to"])
def test_an_input_that_is_also_the_record_is_never_overwritten(
    model: Path, images: Path, tmp_path: Path, how: str
) -> None:
    before = (images / "one.jpg").read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    getattr(out / "predictions.jsonl", how)(images / "one.jpg")
    try:
        run(model, images, "--output", out, "--overwrite")
    except UserError as error:
        assert how == "symlink_to" and "is to be read, and would be overwritten" in str(error)
    assert (images / "one.jpg").read_bytes() == before


@pytest.mark.parametrize("place", ["images/one.jpg", "model", "out/one.png", "out/predictions.jsonl"])
def test_figures_are_not_written_over_what_is_read_or_written(
    model: Path, images: Path, tmp_path: Path, place: str
) -> None:
    path = model if place == "model" else tmp_path / place
    before = path.read_bytes() if path.exists() else b""
    for out in (tmp_path / "out", tmp_path / "images" / ".." / "out"):
        with pytest.raises(UserError, match=r"would be overwritten|would both be written"):
            run(model, images, "--output", out, "--json", path, "--overwrite")
    assert not (tmp_path / "out").exists() and (not before or path.read_bytes() == before)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere/all.json", "is no folder to write all.json into"),
        ("images", "is a folder; the name of a file is needed"),
        ("pipe", "is no regular file"),
        ("old.json", "exist already"),
    ],
)
def test_figures_that_cannot_be_written_are_refused_before_any_work(
    model: Path, images: Path, tmp_path: Path, place: str, message: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        run(model, images, "--output", tmp_path / "out", "--json", tmp_path / place)
    assert not (tmp_path / "out").exists() and (tmp_path / "pipe").is_fifo()


def test_places_that_no_output_can_have_are_refused_before_any_work(model: Path, images: Path, tmp_path: Path) -> None:
    (images / "one.png").mkdir()
    Image.fromarray(pixels(8, 8)).save(images / "one.png" / "within.jpg")
    with pytest.raises(UserError, match=r"one\.jpg would be written to .*one\.png, where .*within\.jpg needs a folder"):
        run(model, images, "--output", tmp_path / "out")
    (tmp_path / "other" / "one.png").mkdir(parents=True)
    with pytest.raises(UserError, match=r"other/one\.png is a folder; the name of a file is needed"):
        run(model, images / "one.jpg", "--output", tmp_path / "other", "--overwrite")
    with pytest.raises(UserError, match="name is empty"):
        run(model, "", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_line_that_the_disk_has_no_room_for_is_taken_back(predictor: Predictor, tmp_path: Path) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:7])

    with (tmp_path / "record").open("wb", buffering=0) as record:
        record.write(b"{}\n")
    with Full(tmp_path / "record", "ab") as full, pytest.raises(OSError, match="No space left") as raised:
        command.Labelling(predictor, full)._failed(jobs.Job(tmp_path, tmp_path, tmp_path), "why")
    assert raised.value.filename == str(tmp_path / "record")
    assert (tmp_path / "record").read_text() == "{}\n"


def test_memory_that_runs_out_on_a_cpu_costs_one_image_alone(model: Path, images: Path, tmp_path: Path) -> None:
    def predict_many(self: Predictor, photos: list[Any]) -> list[Any]:
        if photos[0].shape[1] == 60:
            torch.empty(1 << 50)
        return [np.ones(photo.shape[:2], np.uint8) for photo in photos]

    with (
        patch.object(Predictor, "predict_many", predict_many),
        pytest.raises(UserError, match=r"1 of 2 images .*memory"),
    ):
        run(model, images, "--output", tmp_path / "out")
    assert "error" in lines_of(tmp_path / "out")["one.jpg"] and "classes" in lines_of(tmp_path / "out")["two.a.b.PNG"]


def test_thin_images_count_as_the_cells_that_they_need(tmp_path: Path) -> None:
    Image.fromarray(pixels(1, 1000)).save(tmp_path / "thin.png")
    assert read_rgb(tmp_path / "thin.png", max_pixels=32_000).shape == (1, 1000, 3)
    with pytest.raises(UserError, match=r"is 1000x1; at most 31,999 pixels \(32 at least count on each side\)"):
        read_rgb(tmp_path / "thin.png", max_pixels=31_999)
    with pytest.raises(UserError, match="at most 0 pixels"):
        read_rgb(tmp_path / "thin.png", max_pixels=0)
    Image.fromarray(pixels(1, 1_000_001)).save(tmp_path / "long.png")
    with pytest.raises(UserError, match="sides of at most 1,000,000 are needed"):
        read_rgb(tmp_path / "long.png")


def test_outputs_that_exist_are_refused_unless_told_to_overwrite(model: Path, images: Path, tmp_path: Path) -> None:
    run(model, images / "one.jpg", "--output", tmp_path / "out")
    with pytest.raises(UserError, match=r"one\.png, .*exist already"):
        run(model, images / "one.jpg", "--output", tmp_path / "out")
    run(model, images / "one.jpg", "--output", tmp_path / "out", "--overwrite")


def test_outputs_within_the_folder_of_images_are_not_labelled_themselves(model: Path, images: Path) -> None:
    run(model, images, "--output", images / "out")
    run(model, images, "--output", images / "out", "--overwrite")
    assert len(written(images / "out")) == 5


def test_an_output_folder_around_the_images_hides_none(model: Path, images: Path) -> None:
    run(model, images, "--output", images.parent)
    assert (images.parent / "one.png").is_file()


def test_images_of_the_same_name_are_refused_before_any_work(model: Path, images: Path, tmp_path: Path) -> None:
    Image.fromarray(pixels(8, 8)).save(images / "sub" / "one.png")
    with pytest.raises(UserError, match=r"images/one\.jpg and .*sub/one\.png would both be written to .*out/one\.png"):
        run(model, images / "one.jpg", images / "sub" / "one.png", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_named_like_the_overlay_of_another_is_refused(model: Path, images: Path, tmp_path: Path) -> None:
    Image.fromarray(pixels(8, 8)).save(images / "one_overlay.jpg")
    with pytest.raises(UserError, match=r"would both be written to .*one_overlay\.png"):
        run(model, images, "--output", tmp_path / "out")


def test_an_image_is_never_overwritten_even_if_told_to_overwrite(model: Path, images: Path) -> None:
    before = (images / "sub" / "two.a.b.PNG").read_bytes()
    (images / "sub" / "two.a.b.PNG").rename(images / "sub" / "two.a.b.png")
    with pytest.raises(UserError, match="would be overwritten; choose another --output"):
        run(model, images, "--output", images, "--overwrite")
    assert (images / "sub" / "two.a.b.png").read_bytes() == before


def test_an_image_that_does_not_decode_is_named_and_the_others_are_done(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (images / "one.jpg").read_bytes()
    (images / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "text.png").write_text("no image")
    out = tmp_path / "out"
    code = run_script("predict", [str(model), str(images), "--output", str(out), "--device", "cpu"])
    printed = capsys.readouterr()
    assert code == 2
    assert "error: 2 of 4 images were not labelled" in printed.err
    assert "broken.jpg cannot be decoded" in printed.err and "text.png cannot be decoded" in printed.err
    assert "2 images labelled" in printed.out
    assert len(written(out)) == 5
    lines = lines_of(out)
    assert len(lines) == 4 and "cannot be decoded" in lines["broken.jpg"]["error"] and "classes" in lines["one.jpg"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.jpg", "no image or folder"), ("empty", "holds no images"), ("f", "is a file"), ("*.gif", "matches no")],
)
def test_wrong_inputs_are_refused(model: Path, images: Path, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "f").write_text("")
    output = tmp_path / ("f" if name == "f" else "out")
    with pytest.raises(UserError, match=message):
        run(model, images if name == "f" else tmp_path / name, "--output", output)


def test_confidence_on_request_is_the_probability_of_each_label(
    model: Path, predictor: Predictor, images: Path, tmp_path: Path
) -> None:
    run(model, images, "--output", tmp_path / "out", "--precision", "float32", "--confidence")
    assert [name for name in written(tmp_path / "out") if "confidence" in name] == [
        "one_confidence.png",
        "sub/two.a.b_confidence.png",
    ]
    found = np.asarray(Image.open(tmp_path / "out" / "one_confidence.png"))
    scores = torch.from_numpy(predictor.scores(read_rgb(images / "one.jpg")))
    assert np.abs(found - 255 * scores.softmax(0).amax(0).numpy()).max() <= 1
    with pytest.raises(UserError, match=r"one_confidence\.png"):
        run(model, images, "--output", tmp_path / "out", "--confidence")
    labels = np.asarray(Image.open(tmp_path / "out" / "one.png"))
    assert (labels == predictor.predict(read_rgb(images / "one.jpg"))).mean() > 0.99
