"""One tar shard and its member records in; everything that is not as the index says out."""

import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fcn_dist.data.packing.tarshard import IMAGE_SUFFIX, MASK_SUFFIX
from fcn_dist.data.pixel_counts import PixelCounts
from fcn_dist.data.scenes.images import FileProblem, max_bytes, read_image
from fcn_dist.data.scenes.masks import read_mask
from fcn_dist.data.shard import Sample, Shard, load_members
from fcn_dist.data.verifying.tarwalk import Member, walk
from fcn_dist.data.workers import Advance
from fcn_dist.errors import UserError
from fcn_dist.files import sha256

_FOREIGN_MEMBERS = 1000  # of one shard that are named
_LONGEST_SHOWN = 200  # characters of a member's name
_LARGEST_RECORDS = 2**28  # bytes; those of a million samples take less
_BLOCK = 2**20
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
    max_pixels: int
    deep: bool


class ShardFindings(NamedTuple):
    """What verifying one shard has shown."""

    problems: list[Problem]
    keys: list[str]
    counts: PixelCounts  # of the whole samples; zero unless deep


def verify_shard(check: ShardCheck, advance: Advance) -> ShardFindings:
    """Find everything that is wrong with one shard, whatever else is wrong with it."""
    shard, counts = check.shard, PixelCounts.zero(check.num_classes)
    problems = [*_file_problems(shard.path, shard.size, shard.sha256)]
    problems += _file_problems(shard.members_path, shard.members_size, shard.members_sha256)
    records: NDArray[np.void] | None = None
    if shard.members_path.is_file():
        try:
            records = _load_records(shard)
        except UserError as error:
            problems.append(Problem(shard.members_path.name, "", str(error)))
    keys = [] if records is None else [bytes(key).decode(errors="replace") for key in records["key"]]
    if not shard.path.is_file():
        return ShardFindings(problems, keys, counts)

    def add(member: str, reason: str) -> None:
        problems.append(Problem(shard.path.name, printable(member), reason))

    walked, stop = walk(shard.path, at_most=2 * shard.num_samples + _FOREIGN_MEMBERS)
    if stop:
        add("", stop)
    for name, reason in _name_problems(walked):
        add(name, reason)
    if records is None:
        for name, reason in _pair_problems(walked, shard.num_samples):
            add(name, reason)
    else:
        for name, reason in _order_problems(walked, keys, records):
            add(name, reason)
        for name, reason in _sample_problems(check, keys, records, counts, advance):
            add(name, reason)
    return ShardFindings(problems, keys, counts)


def printable(name: str) -> str:
    """A name as it can be shown: what hostile ones hold may steer a terminal, or fill it."""
    shown = name if name.isprintable() else ascii(name)
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}... ({len(name)} characters)"


def _file_problems(path: Path, size: int, digest: str) -> Iterator[Problem]:
    if not path.is_file():
        yield Problem(path.name, "", "is missing, but the index lists it")
        return
    found = path.stat().st_size
    if found != size:
        yield Problem(path.name, "", f"has {found} bytes, but the index says {size}")
    elif sha256(path) != digest:
        yield Problem(path.name, "", "does not have the SHA-256 that the index says: its contents have changed")


def _load_records(shard: Shard) -> "NDArray[np.void]":
    if shard.members_size > _LARGEST_RECORDS:
        raise UserError(f"{shard.members_size} bytes are more than the records of any shard take")
    return load_members(shard)


def _name_problems(walked: list[Member]) -> Iterator[tuple[str, str]]:
    for member in walked:
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield member.name, f"is no regular file (tar type {member.type!r})"
        if "/" in member.name or "\\" in member.name:
            yield member.name, "is a path; only plain file names belong in a shard"
    for name, times in Counter(member.name for member in walked).items():
        if times > 1:
            yield name, f"stands there {times} times"


def _pair_problems(walked: list[Member], num_samples: int) -> Iterator[tuple[str, str]]:
    if len(walked) != len(_PARTS) * num_samples:
        needed = f"the {num_samples} samples of the index are {len(_PARTS) * num_samples}"
        yield "", f"a reader of the tar comes to {len(walked)} members, but {needed}"
    for position, member in enumerate(walked):
        key, _, suffix = member.name.partition(".")
        partner = position + (1 if f".{suffix}" == IMAGE_SUFFIX else -1)
        expected = key + (MASK_SUFFIX if f".{suffix}" == IMAGE_SUFFIX else IMAGE_SUFFIX)
        if not 0 <= partner < len(walked) or walked[partner].name != expected:
            yield member.name, f"does not stand beside {expected}, so that readers see a part of a sample"


def _order_problems(walked: list[Member], keys: list[str], records: NDArray[np.void]) -> Iterator[tuple[str, str]]:
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
    check: ShardCheck, keys: list[str], records: NDArray[np.void], counts: PixelCounts, advance: Advance
) -> Iterator[tuple[str, str]]:
    with check.shard.path.open("rb", buffering=0) as file:
        for key, record in zip(keys, records, strict=True):
            height, width = int(record["height"]), int(record["width"])
            sound = height * width <= check.max_pixels
            if not sound:
                yield key, f"is recorded with {width}x{height} pixels, but the index allows {check.max_pixels}"
            for part, suffix in _PARTS:
                reason = _payload_problem(file, record, part, check.max_pixels)
                if reason:
                    sound = False
                    yield key + suffix, reason
            if check.deep and sound:
                sample = Sample(key, *(_payload(file, record, part) for part, _ in _PARTS))
                for suffix, reason in _decode_problems(sample, (height, width), check, counts):
                    yield key + suffix, reason
            advance(1)


def _payload_problem(file: FileIO, record: np.void, part: str, max_pixels: int) -> str:
    size, offset = int(record[f"{part}_size"]), int(record[f"{part}_offset"])
    if size > max_bytes(max_pixels):
        return f"{size} bytes are recorded, more than an image of {max_pixels} pixels takes"
    checksum = 0
    # In small blocks, since what the record says of the size may be wrong.
    for start in range(offset, offset + size, _BLOCK):
        block = os.pread(file.fileno(), min(_BLOCK, offset + size - start), start)
        checksum = zlib.crc32(block, checksum)
        if not block:
            break
    return "" if checksum == record[f"{part}_crc32"] else "its bytes do not have the checksum of its record"


def _payload(file: FileIO, record: np.void, part: str) -> bytes:
    return os.pread(file.fileno(), int(record[f"{part}_size"]), int(record[f"{part}_offset"]))


def _decode_problems(
    sample: Sample, size: tuple[int, int], check: ShardCheck, counts: PixelCounts
) -> Iterator[tuple[str, str]]:
    """By what packing would say of the two files; a sound sample is counted."""
    image = mask = None
    try:
        image = read_image(sample.image, check.max_pixels)
        if image.conversions or image.orientation != 1:
            yield IMAGE_SUFFIX, f"is no upright RGB JPEG ({', '.join(image.conversions) or 'orientation tag'})"
    except FileProblem as problem:
        yield IMAGE_SUFFIX, f"{problem.kind}: {problem.detail}"
    try:
        mask = read_mask(sample.mask, check.num_classes, check.max_pixels)
        if mask.conversion:
            yield MASK_SUFFIX, f"is no plain 8-bit gray PNG ({mask.conversion})"
    except FileProblem as problem:
        yield MASK_SUFFIX, f"{problem.kind}: {problem.detail}"
    for suffix, read in ((IMAGE_SUFFIX, image), (MASK_SUFFIX, mask)):
        if read and read.size != size:
            yield suffix, f"is {read.size[1]}x{read.size[0]}, but {size[1]}x{size[0]} is recorded"
    if image and mask and image.decoded is not None and image.size == mask.size == size:
        counts.add_pair(image.decoded, mask.labels)
