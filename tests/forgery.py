"""Damaging a packed set, and forging one whose hashes and records agree with a tar that is wrong in itself."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fcn_dist.data.shard import read_members
from fcn_dist.data.verifying.verify import verify
from fcn_dist.files import sha256

TAR, MEMBERS = "training-000001.tar", "training-000001.members.npy"


def problems(packed: Path, deep: bool = False) -> list[str]:
    """Every problem as one line; the untouched split must have none."""
    read_members.cache_clear()
    reports = {report.split: report for report in verify(packed, deep, workers=1)}
    assert not reports.get("validation") or not reports["validation"].problems
    return [f"{p.file} {p.member}: {p.reason}" for p in reports["training"].problems]


def assert_found(found: list[str], *expected: str) -> None:
    """Each problem found has its expected words, in this order, and there are no others."""
    assert len(found) == len(expected), found
    for line, words in zip(found, expected, strict=True):
        assert all(word in line for word in words.split(" | ")), (line, words)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def forge(packed: Path, write: Callable[[tarfile.TarFile, dict[str, bytes]], object]) -> None:
    """Write the shard anew and make index and records fit it wherever they can."""
    folder = packed / "training"
    with tarfile.open(folder / TAR) as tar:
        payloads = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    with tarfile.open(folder / TAR, "w") as tar:
        write(tar, payloads)
    records = np.load(folder / MEMBERS)
    with tarfile.open(folder / TAR) as tar:
        infos = {info.name: info for info in tar if info.isfile()}
        for record in records:
            for part, suffix in (("image", ".jpg"), ("mask", ".png")):
                info = infos.get(record["key"].decode() + suffix)
                if info:
                    payload = tar.extractfile(info).read()  # type: ignore[union-attr]
                    record[f"{part}_offset"], record[f"{part}_size"] = info.offset_data, info.size
                    record[f"{part}_crc32"] = crc32(payload)
    np.save(folder / MEMBERS, records)
    seal(packed)


def seal(packed: Path) -> None:
    """Let the index state size and hash of the shard and its records as they are now."""
    folder = packed / "training"
    change_index(
        packed,
        filesize=(folder / TAR).stat().st_size,
        sha256=sha256(folder / TAR),
        members_filesize=(folder / MEMBERS).stat().st_size,
        members_sha256=sha256(folder / MEMBERS),
    )


def change_index(packed: Path, **entries: object) -> None:
    """Change what the index says of the shard."""
    path = packed / "training" / "index.json"
    index = json.loads(path.read_text())
    index["shardlist"][1] |= entries
    index["num_samples"] = sum(entry["nsamples"] for entry in index["shardlist"])
    path.write_text(json.dumps(index))


def add(tar: tarfile.TarFile, name: str, payload: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(payload), kind, link
    tar.addfile(info, io.BytesIO(payload))


def add_all(tar: tarfile.TarFile, payloads: dict[str, bytes], *names: str) -> None:
    for name in names or payloads:
        add(tar, name, payloads[name])


A_JPG, A_PNG, B_JPG, B_PNG = (f"training_000{i}{suffix}" for i in (2, 3) for suffix in (".jpg", ".png"))


def encoded(array: NDArray[np.uint8] | NDArray[np.uint16], form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()
