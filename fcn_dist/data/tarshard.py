"""Checked pairs in; one tar shard with its member records beside it out, the same bytes on every run."""

import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import numpy as np

from fcn_dist.data.pairs import EncodedPair, PairRules, read_pair
from fcn_dist.data.pixel_counts import PixelCounts
from fcn_dist.data.scenes import CheckedPair
from fcn_dist.data.shardset import Sample, Shard, member_dtype, members_path
from fcn_dist.data.transforms import decode
from fcn_dist.errors import UserError
from fcn_dist.files import replacing, sha256

IMAGE_SUFFIX, MASK_SUFFIX = ".jpg", ".png"


@dataclass(frozen=True)
class ShardJob:
    """One shard to write, and what it shall hold."""

    path: Path
    pairs: tuple[CheckedPair, ...]
    rules: PairRules


def write_shard(job: ShardJob) -> tuple[Shard, PixelCounts]:
    """Write one shard and its members file, each whole or not there; returns what the index says of it."""
    counts = PixelCounts.zero(job.rules.num_classes)
    records: list[tuple[bytes | int, ...]] = []
    with replacing(job.path) as partial:
        # PAX headers hold names of any length in any script.
        with partial.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for checked in job.pairs:
                encoded = _encode(checked, job.rules)
                size = count_sample(Sample(checked.pair.key, *encoded), counts)
                assert size == (checked.height, checked.width), (checked, size)
                key = checked.pair.key
                image_at = _add(tar, file, key + IMAGE_SUFFIX, encoded.image)
                mask_at = _add(tar, file, key + MASK_SUFFIX, encoded.mask)
                records.append((key.encode(), *image_at, *mask_at, *size))
        num_bytes, digest = partial.stat().st_size, sha256(partial)
    key_bytes = max(len(checked.pair.key.encode()) for checked in job.pairs)
    with replacing(members_path(job.path)) as partial:
        with partial.open("wb") as file:
            np.save(file, np.array(records, member_dtype(key_bytes)), allow_pickle=False)
        members = partial.stat().st_size, sha256(partial)
    return Shard(job.path, len(records), num_bytes, digest, *members), counts


def _add(tar: tarfile.TarFile, file: BinaryIO, name: str, payload: bytes) -> tuple[int, int, int]:
    """Offset, size and CRC-32 of the payload just written."""
    info = tarfile.TarInfo(name)  # mtime, uid and gid 0, no names, mode 0644
    info.size = len(payload)
    tar.addfile(info, BytesIO(payload))
    padding = -len(payload) % tarfile.BLOCKSIZE
    return file.tell() - padding - len(payload), len(payload), crc32(payload)


def _encode(checked: CheckedPair, rules: PairRules) -> EncodedPair:
    files = []
    for path, crc in (
        (checked.pair.image_path, checked.image_crc32),
        (checked.pair.mask_path, checked.mask_crc32),
    ):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} could be read before but not now ({error.strerror}); pack again") from error
        if crc32(data) != crc:
            raise UserError(f"{path} has changed since it was checked; let no one write there, and pack again")
        files.append(data)
    image, mask = files
    return read_pair(image, mask, rules).encode() if checked.conversions else EncodedPair(image, mask)


def count_sample(sample: Sample, counts: PixelCounts) -> tuple[int, int]:
    """Add one packed sample to `counts`, decoded as training decodes it; returns its height and width."""
    image, labels = decode(sample)
    counts.add_pair(image, labels)
    height, width = labels.shape
    return height, width
