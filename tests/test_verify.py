"""Everything that can be wrong with a shard set is found, and a sound one is said to be sound."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeScenes
from forgery import (
    A_JPG,
    A_PNG,
    B_JPG,
    B_PNG,
    MEMBERS,
    TAR,
    add,
    add_all,
    assert_found,
    encoded,
    flip,
    forge,
    problems,
)

from fcn_dist.commands.verify import main
from fcn_dist.data.packing.run import pack
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.verifying.verify import verify
from fcn_dist.errors import UserError

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def packed(make_scenes: MakeScenes, tmp_path: Path) -> Path:
    pack(make_scenes(n=6), tmp_path / "out", workers=1, samples_per_shard=2, keep_order=True)
    return tmp_path / "out"


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_sound_set_has_no_problems(packed: Path, deep: bool, workers: int) -> None:
    reports = verify(packed, deep, workers)
    assert [(r.split, r.num_samples, r.num_shards, r.problems) for r in reports] == [
        ("training", 6, 3, []),
        ("validation", 6, 3, []),
    ]
    (alone,) = verify(packed / "training", deep, workers)
    assert alone == reports[0]


def test_one_flipped_bit_in_a_payload_is_named_by_its_member(packed: Path) -> None:
    shard, record = ShardSet.open(packed, "training").locate(3)
    flip(shard.path, int(record["image_offset"]) + 99)
    assert_found(problems(packed), f"{TAR} | SHA-256", f"{TAR} training_0003.jpg | checksum")


def test_one_flipped_bit_in_a_header_is_found_with_all_that_it_hides(packed: Path) -> None:
    shard, record = ShardSet.open(packed, "training").locate(3)
    flip(shard.path, int(record["image_offset"]) - 512)
    assert_found(
        problems(packed),
        f"{TAR} | SHA-256",
        f"{TAR} training_0003.jpg | does not come to it",
        f"{TAR} training_0003.png | does not come to it",
    )


def test_a_shard_cut_short_is_found(packed: Path) -> None:
    shard, record = ShardSet.open(packed, "training").locate(3)
    shard.path.write_bytes(shard.path.read_bytes()[: int(record["mask_offset"]) + 10])
    found = problems(packed)
    assert any("bytes, but the index says" in line for line in found)
    assert any("training_0003.png" in line and "checksum" in line for line in found)


def test_missing_and_extra_shards_are_found(packed: Path) -> None:
    folder = packed / "training"
    (folder / TAR).rename(folder / "training-000007.tar")
    (folder / "training-000000.members.npy").unlink()
    (folder / ".training-000002.tar.5.partial").write_text("")
    assert_found(
        problems(packed),
        ".training-000002.tar.5.partial | not in index.json",
        "training-000007.tar | not in index.json",
        "training-000000.members.npy | is missing",
        f"{TAR} | is missing",
    )


def test_records_that_were_changed_are_found(packed: Path) -> None:
    path = packed / "training" / MEMBERS
    records = np.load(path)
    records["mask_size"][0] += 1
    np.save(path, records)
    assert_found(
        problems(packed),
        f"{MEMBERS} | SHA-256",
        f"{TAR} training_0002.png | are recorded",
        f"{TAR} training_0002.png | checksum",
    )


def test_a_broken_index_is_a_problem_of_its_split_alone(packed: Path) -> None:
    (packed / "training" / "index.json").write_text("{")
    assert_found(problems(packed), "index.json | is not JSON")


# --- forgeries: hashes and records that agree with a tar that is wrong in itself -----------------------------


def test_a_forged_shard_that_is_right_passes(packed: Path) -> None:
    forge(packed, add_all)
    assert_found(problems(packed, deep=True))


def test_another_order_of_members_is_found(packed: Path) -> None:
    forge(packed, lambda tar, payloads: add_all(tar, payloads, A_JPG, B_JPG, A_PNG, B_PNG))
    assert_found(problems(packed), f"{TAR} {B_JPG} | the order is another")


def test_links_paths_and_members_that_are_not_recorded_are_found(packed: Path) -> None:
    def write(tar: tarfile.TarFile, payloads: dict[str, bytes]) -> None:
        add_all(tar, payloads)
        add(tar, "x.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add(tar, "../y.jpg", b"1")
        add(tar, "/z.jpg", b"1")

    forge(packed, write)
    found = problems(packed)
    assert_found(
        found,
        "x.jpg | no regular file",
        "../y.jpg | is a path",
        "/z.jpg | is a path",
        "x.jpg | not recorded",
        "../y.jpg | not recorded",
        "/z.jpg | not recorded",
    )


def test_a_member_that_stands_twice_is_found(packed: Path) -> None:
    def write(tar: tarfile.TarFile, payloads: dict[str, bytes]) -> None:
        add_all(tar, payloads)
        add(tar, B_PNG, payloads[B_PNG])

    forge(packed, write)
    assert_found(problems(packed), f"{B_PNG} | stands there 2 times")


def test_a_missing_partner_is_found_even_without_records(packed: Path) -> None:
    forge(packed, lambda tar, payloads: add_all(tar, payloads, A_JPG, A_PNG, B_JPG))
    (packed / "training" / MEMBERS).unlink()
    assert_found(
        problems(packed),
        f"{MEMBERS} | is missing",
        f"{TAR} | comes to 3 members | 2 samples of the index are 4",
        f"{B_JPG} | does not stand beside {B_PNG}",
    )


def test_one_key_in_two_shards_is_found(packed: Path) -> None:
    folder = packed / "training"
    for suffix in (".tar", ".members.npy"):
        (folder / f"training-000002{suffix}").write_bytes((folder / f"training-000001{suffix}").read_bytes())
    index = json.loads((folder / "index.json").read_text())
    index["shardlist"][2] = {**index["shardlist"][1], "url": "training-000002.tar"}
    (folder / "index.json").write_text(json.dumps(index))
    assert_found(problems(packed), *(f"training-000002.tar training_000{i} | {TAR} as well" for i in (2, 3)))


@pytest.mark.parametrize(
    ("member", "payload", "words"),
    [
        (A_JPG, b"no image", "undecodable"),
        (A_JPG, encoded(np.zeros((24, 32), np.uint8), "JPEG"), "no upright RGB JPEG (grayscale"),
        (A_JPG, encoded(np.zeros((23, 32, 3), np.uint8), "JPEG"), "is 32x23, but 32x24 is recorded"),
        (A_PNG, encoded(np.full((24, 32), 6, np.uint8), "PNG"), "label above 5"),
        (A_PNG, encoded(np.zeros((24, 31), np.uint8), "PNG"), "is 31x24, but 32x24 is recorded"),
        (A_PNG, encoded(np.zeros((24, 32, 3), np.uint8), "PNG"), "mask in colour"),
        (A_PNG, encoded(np.zeros((24, 32), np.uint16), "PNG"), "no plain 8-bit gray PNG"),
    ],
)
def test_only_a_deep_look_finds_a_sample_that_was_packed_wrong(
    packed: Path, member: str, payload: bytes, words: str
) -> None:
    forge(packed, lambda tar, payloads: add_all(tar, {**payloads, member: payload}))
    assert_found(problems(packed))
    assert_found(problems(packed, deep=True), f"{TAR} {member} | {words}")


def test_a_deep_look_recounts_the_pixels(packed: Path) -> None:
    path = packed / "training" / "index.json"
    index = json.loads(path.read_text())
    index["class_pixels"][2] += 1
    index["channel_mean"][0] += 5
    path.write_text(json.dumps(index))
    assert_found(problems(packed))
    assert_found(problems(packed, deep=True), "class_pixels of label 2", "channel_mean")


# --- the commands --------------------------------------------------------------------------------------------


def run(script: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(REPO / "shards" / f"{script}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_says_all_is_good_or_exits_2_listing_everything(packed: Path, tmp_path: Path) -> None:
    done = run("verify", packed, "--deep", "--json", tmp_path / "v.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("all good: 12 samples in 6 shards")
    assert json.loads((tmp_path / "v.json").read_text())["ok"] is True
    for number in range(3):
        flip(packed / "training" / f"training-00000{number}.tar", 700)
    done = run("verify", packed, "--json", tmp_path / "v.json")
    assert done.returncode == 2
    assert done.stderr.count("SHA-256") == done.stderr.count("checksum") == 3
    assert "6 problems" in done.stderr
    assert "training/training-000002.tar: training_0004.jpg" in done.stderr
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["ok"] is False
    assert len(report["splits"]["training"]["problems"]) == 6


def test_a_folder_with_nothing_to_verify_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no shard set"):
        main([str(tmp_path)])
