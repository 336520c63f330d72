"""Damage done to real shards: all of it is found and named, nothing is written, and memory stays small."""

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from conftest import MakeScenes, tree_bytes
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
    change_index,
    flip,
    forge,
    problems,
    seal,
)

from fcn_dist.data.packing.run import pack
from fcn_dist.data.shardset import ShardSet

MB = 2**20


@pytest.fixture
def packed(make_scenes: MakeScenes, tmp_path: Path) -> Path:
    pack(make_scenes(n=6), tmp_path / "out", workers=1, samples_per_shard=2, keep_order=True)
    return tmp_path / "out"


@pytest.fixture
def tar(packed: Path) -> Path:
    return packed / "training" / TAR


def members_of(tar: Path) -> dict[str, tuple[int, int]]:
    """Start of the header and end of the payload of each member."""
    with tarfile.open(tar) as opened:
        return {info.name: (info.offset, info.offset_data + info.size) for info in opened}


def test_a_cut_anywhere_names_every_sample_that_is_lost(packed: Path, tar: Path) -> None:
    whole, members = tar.read_bytes(), members_of(tar)
    boundaries = [end for span in members.values() for end in span]
    inside = range(0, len(whole), 701)
    for length in sorted({*boundaries, *(n + 512 for n in boundaries), *inside}):
        tar.write_bytes(whole[:length])
        found = problems(packed)
        assert length >= len(whole) or any(f"has {length} bytes, but the index says" in line for line in found)
        for name, (_, end) in members.items():
            assert end <= length or any(f"{TAR} {name}: " in line for line in found), (length, name, found)


def test_a_flipped_bit_anywhere_is_found(packed: Path, tar: Path) -> None:
    for path in (tar, packed / "training" / MEMBERS):
        whole = path.read_bytes()
        for position in range(0, len(whole), 173):
            flip(path, position)
            assert any(path.name in line and "SHA-256" in line for line in problems(packed)), position
            path.write_bytes(whole)
    assert_found(problems(packed, deep=True))


@pytest.mark.parametrize("contents", [b"", b"\0", b"garbage", b"\0" * 10240, b"\x1f\x8b" + b"x" * 600, b"x" * 20000])
def test_empty_and_garbage_files_are_found_even_if_the_index_vouches_for_them(packed: Path, contents: bytes) -> None:
    folder = packed / "training"
    for name in (TAR, MEMBERS):
        shutil.copy(folder / name, packed / name)
        (folder / name).write_bytes(contents)
        assert any(line.startswith((f"{name} : has ", f"{name} : does not have")) for line in problems(packed))
        seal(packed)
        found = problems(packed)
        if name == TAR:
            assert all(any(f"{TAR} {lost}: " in line for line in found) for lost in (A_JPG, A_PNG, B_JPG, B_PNG)), found
        else:
            assert any(line.startswith(f"{MEMBERS} : ") for line in found), found
        shutil.copy(packed / name, folder / name)
        seal(packed)
        assert_found(problems(packed))


def test_interleaved_members_are_found_with_and_without_records(packed: Path) -> None:
    forge(packed, lambda tar, payloads: add_all(tar, payloads, A_JPG, B_JPG, B_PNG, A_PNG))
    assert_found(problems(packed), f"{B_JPG} | the order is another")
    (packed / "training" / MEMBERS).unlink()
    found = problems(packed)
    assert sum("does not stand beside" in line for line in found) == 2, found


PATHS = ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "..\\x.jpg", "C:\\x.jpg"]


@pytest.mark.parametrize("name", [*PATHS, "x\n\x1b[31m.jpg", "\udcff.jpg", "y" * 5000, ""])
def test_hostile_names_are_found_and_shown_harmlessly(packed: Path, name: str) -> None:
    def write(tar: tarfile.TarFile, payloads: dict[str, bytes]) -> None:
        add_all(tar, payloads)
        add(tar, name, b"1")

    forge(packed, write)
    before = tree_bytes(packed.parent)
    found = problems(packed, deep=True)
    assert any("not recorded" in line for line in found), found
    assert any("is a path" in line for line in found) == (name in PATHS)
    assert all(line.isprintable() and len(line) < 400 for line in found)
    assert tree_bytes(packed.parent) == before


SPECIAL = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]


@pytest.mark.parametrize("kind", [*SPECIAL, b"Z"])
def test_whatever_is_no_regular_file_is_found_even_under_a_samples_name(packed: Path, kind: bytes) -> None:
    def write(tar: tarfile.TarFile, payloads: dict[str, bytes]) -> None:
        add_all(tar, payloads, A_JPG, A_PNG, B_JPG)
        add(tar, B_PNG, kind=kind, link="/etc/passwd")

    forge(packed, write)
    before = tree_bytes(packed.parent)
    found = problems(packed, deep=True)
    assert any(f"{B_PNG}: is no regular file" in line for line in found), found
    assert any(f"{B_PNG}: " in line for line in found), found
    assert tree_bytes(packed.parent) == before


# --- sizes that are not true ----------------------------------------------------------------------------------

PROBE = """
import resource, sys
from fcn_dist.data.verifying.verify import verify
verify(sys.argv[2], deep=True, workers=1)  # what is loaded for the first time
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reports = verify(sys.argv[1], deep=True, workers=1)
for report in reports:
    for p in report.problems:
        print(f"{p.file} {p.member}: {p.reason}")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def problems_and_memory(packed: Path) -> tuple[list[str], int]:
    """The problems of the training split, and by how many MB verifying it has raised the memory in use."""
    command = [sys.executable, "-c", PROBE, str(packed / "training"), str(packed / "validation")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    *found, memory = done.stdout.splitlines()
    return found, int(memory)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A sound header that states any size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


FALSE_SIZES = {
    "huge": header("x.jpg", 8 * 1024**3),
    "backwards": header("x.jpg", -512),
    "far backwards": header("x.jpg", -(2**40)),
    "huge extended header": header("x.jpg", 8 * 1024**3, tarfile.XHDTYPE),
    "large extended header": header("x.jpg", 700 * MB, tarfile.XHDTYPE),
    "large long name": header("x.jpg", 700 * MB, tarfile.GNUTYPE_LONGNAME),
    "backwards extended header": header("x.jpg", -512, tarfile.XHDTYPE),
    "huge sparse file": header("x.jpg", 8 * 1024**3, tarfile.GNUTYPE_SPARSE),
    "backwards in an extended header": (
        header("x.jpg", 20, tarfile.XHDTYPE) + b"20 size=-9999999999\n".ljust(512, b"\0") + header("x.jpg", 0)
    ),
    "many extended headers": (header("x.jpg", 9, tarfile.XHDTYPE) + b"9 path=x\n".ljust(512, b"\0")) * 5000,
    "many": header("x.jpg", 0) * 20000,
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("headers", FALSE_SIZES.values(), ids=FALSE_SIZES.keys())
def test_headers_with_false_sizes_cost_no_memory_and_no_time(packed: Path, tar: Path, headers: bytes) -> None:
    start = members_of(tar)[B_JPG][0]
    with tar.open("r+b") as file:
        file.seek(start)
        file.write(headers)
        file.truncate(1024 * MB)  # a hole
    change_index(packed, filesize=1024 * MB + 1)  # so that it need not be hashed
    found, memory = problems_and_memory(packed)
    assert all(any(f"{TAR} {name}: " in line for line in found) for name in (B_JPG, B_PNG)), found
    assert not any(f"{TAR} {name}: " in line for line in found for name in (A_JPG, A_PNG)), found
    assert memory < 60


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("size", "right"), [(500 * MB, False), (700 * MB, True), (2**32 - 1, False)])
def test_records_with_false_sizes_cost_no_memory(packed: Path, tar: Path, size: int, right: bool) -> None:
    """Even if the bytes are there and have the checksum that is recorded."""
    start = tar.stat().st_size
    with tar.open("r+b") as file:
        file.truncate(start + size)  # a hole
    records = np.load(packed / "training" / MEMBERS)
    records["image_size"][1] = size
    if right:
        records["image_offset"][1], checksum = start, 0
        for _ in range(size // MB):
            checksum = crc32(bytes(MB), checksum)
        records["image_crc32"][1] = checksum
    np.save(packed / "training" / MEMBERS, records)
    change_index(packed, filesize=start + size + 1)  # so that it need not be hashed
    found, memory = problems_and_memory(packed)
    reason = "more than an image of" if size > 2**29 + 16 * MB else "checksum of its record"
    assert any(f"{TAR} {B_JPG}: " in line and reason in line for line in found), found
    assert memory < 60


@pytest.mark.timeout(120)
def test_a_file_of_records_that_is_far_too_large_is_not_read(packed: Path) -> None:
    with (packed / "training" / MEMBERS).open("r+b") as file:
        file.truncate(900 * MB)
    seal(packed)
    found, memory = problems_and_memory(packed)
    assert any(f"{MEMBERS} : " in line and "more than the records of any shard take" in line for line in found), found
    assert memory < 60


def huge_jpeg(payload: bytes) -> bytes:
    start = payload.index(b"\xff\xc0") + 5
    return payload[:start] + (60000).to_bytes(2, "big") * 2 + payload[start + 4 :]


def huge_png(payload: bytes) -> bytes:
    ihdr = payload[12:16] + (60000).to_bytes(4, "big") * 2 + payload[24:29]
    return payload[:12] + ihdr + crc32(ihdr).to_bytes(4, "big") + payload[33:]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("member", "blow_up"), [(B_JPG, huge_jpeg), (B_PNG, huge_png)])
@pytest.mark.parametrize("recorded", [24, 60000])
def test_image_bombs_are_refused_by_their_headers(
    packed: Path, member: str, blow_up: Callable[[bytes], bytes], recorded: int
) -> None:
    forge(packed, lambda tar, payloads: add_all(tar, {**payloads, member: blow_up(payloads[member])}))
    records = np.load(packed / "training" / MEMBERS)
    records["height"][1] = recorded
    records["width"][1] = max(32, recorded)
    np.save(packed / "training" / MEMBERS, records)
    seal(packed)
    found, memory = problems_and_memory(packed)
    words = f"{member} | 60000x60000" if recorded == 24 else "training_0003 | recorded with 60000x60000 pixels"
    assert_found(found, f"{TAR} {words}")
    assert memory < 60


def test_the_cap_is_the_one_the_set_was_packed_with(packed: Path) -> None:
    path = packed / "training" / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"max_pixels": 24 * 32 - 1}))
    assert sum("32x24 pixels, but the index allows 767" in line for line in problems(packed)) == 6


# --- counts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_another_count_of_samples_is_found(packed: Path, count: int) -> None:
    change_index(packed, nsamples=count)
    assert_found(
        problems(packed),
        f"{MEMBERS} | {count} records of",
        f"{TAR} | comes to 4 members | {count} samples of the index are {2 * count}",
    )


def test_a_shard_of_too_many_members_is_not_gone_through_to_its_end(packed: Path) -> None:
    def write(tar: tarfile.TarFile, payloads: dict[str, bytes]) -> None:
        add_all(tar, payloads)
        for number in range(3000):
            add(tar, f"{number}.jpg")

    forge(packed, write)
    found = problems(packed)
    assert sum("not recorded" in line for line in found) == 1000
    assert any("has more than 1004 members" in line for line in found)


def test_every_problem_of_every_shard_comes_out_of_parallel_work_too(packed: Path, tmp_path: Path) -> None:
    for shard in ShardSet.open(packed, "training").shards:
        flip(shard.path, 700)
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / "shards" / "verify.py"), str(packed), "--deep"]
    said = [
        subprocess.run([*command, "--workers", n], capture_output=True, text=True, timeout=60, check=False)
        for n in ("1", "2", "3")
    ]
    assert {done.returncode for done in said} == {2}
    assert len({done.stderr for done in said}) == 1
    assert said[0].stderr.count("SHA-256") == said[0].stderr.count("checksum") == 3
