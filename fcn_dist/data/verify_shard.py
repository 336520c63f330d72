"""One tar shard and its member records in; everything that is not as the index says out."""

import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fcn_dist.data.images import FileProblem, read_image
from fcn_dist.data.masks import read_mask
from fcn_dist.data.pixel_counts import PixelCounts
from fcn_dist.data.shardset import Sample, Shard, load_members
from fcn_dist.data.tarshard import IMAGE_SUFFIX, MASK_SUFFIX, count_sample
from fcn_dist.errors import UserError
from fcn_dist.files import sha256

_NO_CAP = 2**62  # packing has capped the sizes, and a checksum vouches that these are its bytes
_PARTS = (("image", IMAGE_SUFFIX), ("mask", MASK_SUFFIX))


class Problem(NamedTuple):
    """One thing that is wrong; `member` is empty where a whole file is meant."""

    file: str
    member: str
    reason: str


class ShardCheck(NamedTuple):
    """One shard to verify."""

    shard: Shard
    num_classes: int
    deep: bool


class ShardFindings(NamedTuple):
    """What verifying one shard has shown."""

    problems: list[Problem]
    keys: list[str]
    counts: PixelCounts  # of the whole samples; zero unless deep


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    type: bytes


def verify_shard(check: ShardCheck) -> ShardFindings:
    """Find everything that is wrong with one shard, whatever else is wrong with it."""
    shard, tar_name = check.shard, check.shard.path.name
    counts = PixelCounts.zero(check.num_classes)
    problems = [*_file_problems(shard.path, shard.sha256, shard.size)]
    problems += _file_problems(shard.members_path, shard.members_sha256)
    records: NDArray[np.void] | None = None
    try:
        records = load_members(shard)
    except UserError as error:
        if shard.members_path.is_file():
            problems.append(Problem(shard.members_path.name, "", str(error)))
    keys = [] if records is None else [bytes(key).decode(errors="replace") for key in records["key"]]
    if not shard.path.is_file():
        return ShardFindings(problems, keys, counts)
    walked, stop = _walk(shard.path)
    if stop:
        problems.append(Problem(tar_name, "", stop))
    problems += [Problem(tar_name, name, reason) for name, reason in _name_problems(walked)]
    if records is None:
        problems += [Problem(tar_name, name, reason) for name, reason in _pair_problems(walked)]
    else:
        problems += [Problem(tar_name, name, reason) for name, reason in _order_problems(walked, keys, records)]
        problems += _sample_problems(check, keys, records, counts)
    return ShardFindings(problems, keys, counts)


def _file_problems(path: Path, digest: str, size: int | None = None) -> Iterator[Problem]:
    if not path.is_file():
        yield Problem(path.name, "", "is missing, but the index lists it")
        return
    found = path.stat().st_size
    if size is not None and found != size:
        yield Problem(path.name, "", f"has {found} bytes, but the index says {size}")
    if sha256(path) != digest:
        yield Problem(path.name, "", "does not have the SHA-256 that the index says: its contents have changed")


def _walk(path: Path) -> tuple[list[_Member], str]:
    """The members as any tar reader comes to them, and why the walk ended early, if it did."""
    members: list[_Member] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                members.append(_Member(info.name, info.offset_data, info.size, info.type))  # noqa: PERF401
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        return members, f"is no whole tar file: after {len(members)} members: {error}"
    return members, ""


def _name_problems(walked: list[_Member]) -> Iterator[tuple[str, str]]:
    for member in walked:
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield member.name, f"is no regular file (tar type {member.type!r})"
        if "/" in member.name or "\\" in member.name:
            yield member.name, "is a path; only plain file names belong in a shard"
    for name, times in Counter(member.name for member in walked).items():
        if times > 1:
            yield name, f"stands there {times} times"


def _pair_problems(walked: list[_Member]) -> Iterator[tuple[str, str]]:
    for position, member in enumerate(walked):
        key, _, suffix = member.name.partition(".")
        partner = position + (1 if f".{suffix}" == IMAGE_SUFFIX else -1)
        expected = key + (MASK_SUFFIX if f".{suffix}" == IMAGE_SUFFIX else IMAGE_SUFFIX)
        if not 0 <= partner < len(walked) or walked[partner].name != expected:
            yield member.name, f"does not stand beside {expected}, so that readers see a part of a sample"


def _order_problems(walked: list[_Member], keys: list[str], records: NDArray[np.void]) -> Iterator[tuple[str, str]]:
    expected = [key + suffix for key in keys for _, suffix in _PARTS]
    names = [member.name for member in walked]
    found = {member.name: member for member in walked}
    for name in expected:
        if name not in found:
            yield name, "is recorded, but a reader of the tar does not come to it"
    known = set(expected)
    for name in names:
        if name not in known:
            yield name, "stands in the tar, but is not recorded"
    if names != expected and sorted(names) == sorted(expected):
        first = next(i for i, name in enumerate(names) if name != expected[i])
        yield names[first], f"stands where {expected[first]} is recorded: the order is another"
    for key, record in zip(keys, records, strict=True):
        for part, suffix in _PARTS:
            place = int(record[f"{part}_offset"]), int(record[f"{part}_size"])
            member = found.get(key + suffix)
            if member and place != (member.offset, member.size):
                reason = f"{member.size} bytes at {member.offset}, but {place[1]} at {place[0]} are recorded"
                yield member.name, reason


def _sample_problems(
    check: ShardCheck, keys: list[str], records: NDArray[np.void], counts: PixelCounts
) -> Iterator[Problem]:
    path = check.shard.path
    with path.open("rb") as file:
        for key, record in zip(keys, records, strict=True):
            whole = []
            for part, suffix in _PARTS:
                file.seek(int(record[f"{part}_offset"]))
                payload = file.read(int(record[f"{part}_size"]))
                if zlib.crc32(payload) == record[f"{part}_crc32"]:
                    whole.append(payload)
                else:
                    yield Problem(path.name, key + suffix, "its bytes do not have the checksum of its record")
            if check.deep and len(whole) == len(_PARTS):
                size = int(record["height"]), int(record["width"])
                for suffix, reason in _decode_problems(Sample(key, *whole), size, check.num_classes, counts):
                    yield Problem(path.name, key + suffix, reason)


def _decode_problems(
    sample: Sample, size: tuple[int, int], num_classes: int, counts: PixelCounts
) -> Iterator[tuple[str, str]]:
    sizes, sound = [], True
    try:
        read = read_image(sample.image, _NO_CAP)
        sizes.append((IMAGE_SUFFIX, read.size))
        if read.conversions or read.orientation != 1:
            sound = False
            yield IMAGE_SUFFIX, f"is no upright RGB JPEG ({', '.join(read.conversions) or 'orientation tag'})"
    except FileProblem as problem:
        sound = False
        yield IMAGE_SUFFIX, f"{problem.kind}: {problem.detail}"
    try:
        labels = read_mask(sample.mask, num_classes, _NO_CAP)
        sizes.append((MASK_SUFFIX, labels.size))
        if labels.conversion:
            sound = False
            yield MASK_SUFFIX, f"is no plain 8-bit gray PNG ({labels.conversion})"
    except FileProblem as problem:
        sound = False
        yield MASK_SUFFIX, f"{problem.kind}: {problem.detail}"
    for suffix, found in sizes:
        if found != size:
            sound = False
            yield suffix, f"is {found[1]}x{found[0]}, but {size[1]}x{size[0]} is recorded"
    if sound:
        count_sample(sample, counts)
