"""One set packed in parts, and merged to what one run makes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import HEIGHT, WIDTH, MakeScenes, save_oriented, smooth, tree_bytes

from fcn_dist.data.packing import merge as merging
from fcn_dist.data.packing.merge import merge
from fcn_dist.data.packing.receipts import WORK_DIR, receipt_path
from fcn_dist.data.packing.run import pack
from fcn_dist.data.packing.unfinished import claimed
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.verifying.verify import verify
from fcn_dist.errors import UserError

REPO = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def scenes(make_scenes: MakeScenes) -> Path:
    """Two splits of 9; samples of several shards are converted."""
    scenes = make_scenes(n=9)
    for number in (1, 4, 7):
        save_oriented(scenes / f"images/training/training_000{number}.jpg", smooth(WIDTH, HEIGHT), 6)
    return scenes


@pytest.fixture
def whole(scenes: Path, tmp_path: Path) -> dict[str, bytes]:
    pack_to(scenes, tmp_path / "whole")
    return tree_bytes(tmp_path / "whole")


def pack_to(scenes: Path, out: Path, *parts: tuple[int, int], **options: Any) -> Path:
    for part in parts or (None,):
        assert pack(scenes, out, workers=1, part=part, **({"samples_per_shard": 2} | options)) == [] or part is None
    return out


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_parts_in_one_folder_make_the_same_set_as_one_run(
    scenes: Path, tmp_path: Path, whole: dict[str, bytes], total: int
) -> None:
    out = pack_to(scenes, tmp_path / "out", *((i, total) for i in range(total, 0, -1)))
    with pytest.raises(UserError, match="is no shard set"):
        ShardSet.open(out, "training")
    merged = merge(out)
    assert [(s.split, len(s)) for s in merged] == [("training", 9), ("validation", 9)]
    assert tree_bytes(out) == whole


def test_parts_of_several_machines_are_copied_and_their_times_do_not_matter(
    scenes: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    for number in (1, 2, 3):
        for path in scenes.rglob("*.*"):
            os.utime(path, (number, number))
        pack_to(scenes, tmp_path / f"machine{number}", (number, 3))
    sources = [tmp_path / "machine2", tmp_path / "machine3"]
    before = [tree_bytes(source) for source in sources]
    merge(tmp_path / "machine1", *sources, workers=2)
    assert tree_bytes(tmp_path / "machine1") == whole
    assert [tree_bytes(source) for source in sources] == before
    merge(tmp_path / "new", *sources, pack_to(scenes, tmp_path / "again", (1, 3)))
    assert tree_bytes(tmp_path / "new") == whole
    assert not any(report.problems for report in verify(tmp_path / "new", deep=True, workers=1))


def test_each_part_packs_its_own_shards_alone_and_can_be_continued(scenes: Path, tmp_path: Path) -> None:
    out = pack_to(scenes, tmp_path / "out", (2, 3))
    assert sorted(path.name for path in out.rglob("*.tar")) == [
        "training-000001.tar",
        "training-000004.tar",
        "validation-000001.tar",
        "validation-000004.tar",
    ]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    pack_to(scenes, out, (2, 3))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == before


def test_the_whole_run_takes_over_what_parts_have_packed(scenes: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = pack_to(scenes, tmp_path / "out", (2, 3))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    pack_to(scenes, out)
    assert tree_bytes(out) == whole
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_is_missing_is_named_by_part_and_shard(scenes: Path, tmp_path: Path) -> None:
    out = pack_to(scenes, tmp_path / "out", (1, 3))
    with pytest.raises(UserError) as caught:
        merge(out)
    for words in (
        "3 of 5 shards are missing",
        "2 of part 2/3 (training-000001.tar, training-000004.tar)",
        "1 of part 3/3",
    ):
        assert words in str(caught.value)
    assert not list(out.rglob("index.json"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "training-000002.tar"),
        (Path.unlink, "training-000002.tar"),
        (lambda tar: flip(tar.with_suffix(".members.npy")), "training-000002.members.npy"),
        (lambda tar: receipt_path(tar).unlink(), "1 of 5 shards are missing: 1 of part 1/2 (training-000002.tar)"),
    ],
)
def test_damaged_parts_are_named_and_no_set_comes_of_them(
    scenes: Path, tmp_path: Path, damage: Callable[[Path], object], words: str, copied: bool
) -> None:
    parts = pack_to(scenes, tmp_path / "parts", (1, 2), (2, 2))
    damage(parts / "training" / "training-000002.tar")
    out = tmp_path / "out" if copied else parts
    with pytest.raises(UserError) as caught:
        merge(out, *([parts] if copied else []))
    assert words in str(caught.value)
    assert not list(out.rglob("index.json")) and not list(out.rglob("*.partial"))
    pack_to(scenes, parts, (1, 2))
    assert [len(shard_set) for shard_set in merge(out, *([parts] if copied else []))] == [9, 9]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"seed": 1}, "other options and other scenes"), ({"max_pixels": 800}, "another --max-pixels")],
)
def test_parts_of_different_plans_are_refused(
    scenes: Path, tmp_path: Path, options: dict[str, int], words: str
) -> None:
    one, two = pack_to(scenes, tmp_path / "one", (1, 2)), pack_to(scenes, tmp_path / "two", (2, 2), **options)
    with pytest.raises(UserError, match=f"two/training was planned with {words}"):
        merge(one, two)


def test_a_shard_that_was_packed_from_other_files_is_not_taken(scenes: Path, tmp_path: Path) -> None:
    out = pack_to(scenes, tmp_path / "out", (1, 2))
    image = scenes / "images/training/training_0000.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    pack_to(scenes, out, (2, 2))
    stale = [json.loads(path.read_text())["part"] for path in (out / "training" / WORK_DIR).glob("training-*.json")]
    assert sorted(stale) == ["1/2"] * 3 + ["2/2"] * 2
    pack(scenes, tmp_path / "whole", ("training",), workers=1, samples_per_shard=2)
    shard_set = ShardSet.open(tmp_path / "whole", "training")
    number = next(i for i in range(9) if shard_set.key(i) == "training_0000") // 2
    if number % 2 == 0:  # otherwise part 2 has packed it
        with pytest.raises(UserError, match=rf"were packed from other files.*1 of part 1/2 \(training-00000{number}"):
            merge(out)
    pack_to(scenes, out, (1, 2))
    merge(out)
    assert tree_bytes(out / "training") == tree_bytes(tmp_path / "whole" / "training")


def test_what_holds_no_parts_is_refused(scenes: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    for folder in (tmp_path / "nothing", tmp_path / "whole"):
        with pytest.raises(UserError, match="no folder in there holds parts"):
            merge(folder)
    parts = pack_to(scenes, tmp_path / "parts", (1, 1))
    with pytest.raises(UserError, match="whole/training already holds a shard set"):
        merge(tmp_path / "whole", parts)
    assert tree_bytes(tmp_path / "whole") == whole
    shutil.rmtree(tmp_path / "whole" / "training")
    with pytest.raises(UserError, match="whole/validation already holds a shard set"):
        merge(tmp_path / "whole", parts)
    assert not (tmp_path / "whole" / "training").exists(), "nothing is copied before all is known"


def test_merging_waits_for_no_part_that_is_still_at_work(scenes: Path, tmp_path: Path) -> None:
    out = pack_to(scenes, tmp_path / "out", (1, 1))
    refused = pytest.raises(UserError, match="is being packed by another run")
    with claimed(out / "training", {}, None, overwrite=False), refused:
        merge(out)
    assert len(merge(out)) == 2


def test_a_merge_that_was_interrupted_is_continued(
    scenes: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = pack_to(scenes, tmp_path / "parts", (1, 1))
    take = merging._take
    taken: list[object] = []

    def interrupted(*arguments: Any) -> str:
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(arguments)
        return take(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "_take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "out", parts, workers=1)
    assert not list((tmp_path / "out").rglob("index.json"))
    first = next((tmp_path / "out").rglob("training-000000.tar"))
    before = first.stat().st_mtime_ns
    merge(tmp_path / "out", parts, workers=1)
    assert first.stat().st_mtime_ns == before
    assert tree_bytes(tmp_path / "out") == whole


def test_the_commands_pack_parts_and_merge_them(scenes: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    def run(script: str, *arguments: object, code: int = 0) -> str:
        command = [sys.executable, str(REPO / "shards" / f"{script}.py"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    out = tmp_path / "out"
    for part in ("1/2", "2/2"):
        said = run("create", scenes, out, "--samples-per-shard", 2, "--part", part)
        assert f"part {part}: " in said and f"shards/merge.py {out}" in said
    said = run("merge", out)
    for words in ("training", "3 x turned upright by its orientation tag"):
        assert words in said
    assert tree_bytes(out) == whole
    assert "holds parts" in run("merge", out, code=2)
    for part in ("", "1", "a/b", "3/2", "-1/2", "1/0"):
        assert "--part is " in run("create", scenes, tmp_path / "other", f"--part={part}", code=2)
