"""What a shard set is said to hold, in figures, on a terminal and on a sheet."""

import json
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeScenes, pixels
from PIL import Image

from fcn_dist.commands.describe import main
from fcn_dist.data.describe import describe
from fcn_dist.data.packing.run import pack
from fcn_dist.data.shardset import ShardSet
from fcn_dist.errors import UserError


@pytest.fixture
def scenes(make_scenes: MakeScenes) -> Path:
    """Two scenes of known labels: 3 of 4 quarters of the first are label 2, the second is all label 5."""
    scenes = make_scenes(n=2, splits=("training",), size=(20, 40))
    for number, (height, width) in enumerate([(20, 40), (30, 20)]):
        labels = np.full((height, width), 5 if number else 2, np.uint8)
        if not number:
            labels[:10, :20] = 0
        Image.fromarray(labels).save(scenes / f"annotations/training/training_000{number}.png")
        image = np.full((height, width, 3), 100 * number, np.uint8)
        Image.fromarray(image).save(scenes / f"images/training/training_000{number}.jpg")
    return scenes


def test_figures_are_those_of_the_scenes(scenes: Path, tmp_path: Path) -> None:
    (shard_set,) = pack(scenes, tmp_path / "out", ("training",), workers=1, samples_per_shard=1)
    d = describe(shard_set)
    assert (d.samples, d.shards, d.bytes) == (2, 2, sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.tar")))
    assert (astuple(d.height), astuple(d.width), astuple(d.short_side)) == ((20, 25, 30), (20, 30, 40), (20, 20, 20))
    assert d.unlabelled_share == 200 / 1400
    assert [(c.label, c.pixel_share, c.images) for c in d.classes] == [
        (2, 0.5, 1),
        (5, 0.5, 1),
        (1, 0, 0),
        (3, 0, 0),
        (4, 0, 0),
    ]
    mean = 100 * 600 / 1400
    assert d.channel_mean == pytest.approx([mean] * 3)


def test_the_command_prints_writes_and_draws(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = scenes / "objectInfo150.txt"
    info.write_text(info.read_text().replace("class 2", "[bold]class; two[/]"))
    pack(scenes, tmp_path / "out", ("training",), workers=1)
    sheet, figures = tmp_path / "sheet.png", tmp_path / "figures.json"
    main([str(tmp_path / "out"), "--top", "3", "--sheet", str(sheet), "--json", str(figures)])
    printed = capsys.readouterr().out
    for words in ("2 in 1 shard", "20 to 30, median 25", "14.3% of all pixels", "[bold]class; two[/]", "50.00%"):
        assert words in printed, printed
    assert "2 more classes, 2 of" in printed
    assert json.loads(figures.read_text())["training"]["classes"][0]["pixel_share"] == 0.5
    shard_set = ShardSet.open(tmp_path / "out", "training")
    # Overlays are half image: a colour by itself stands in the legend alone.
    drawn = {tuple(map(int, pixel)) for pixel in pixels(sheet).reshape(-1, 3)}
    found = [colour in drawn for colour in shard_set.colours]
    assert found == [label in (2, 5) for label in range(1, 6)], "of the classes found, and no other"


@pytest.mark.parametrize("option", ["--top", "--samples"])
def test_counts_below_one_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(UserError, match=f"{option} is 0"):
        main([str(tmp_path), option, "0"])
