"""Shard sets with planted contents: digests, records and index are those of what was planted, as a hostile packer's."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import numpy as np

from fcn_dist.data.members import member_dtype, members_path


def plant(split_dir: Path, change: Callable[[str, bytes, bytes], tuple[bytes, bytes]], **index_fields: object) -> None:
    """Write every shard of a packed split anew, with what `change(key, image, mask)` returns as the payloads.

    Recorded sizes stay those of the scenes that were packed.
    """
    index = json.loads((split_dir / "index.json").read_text())
    for entry in index["shardlist"]:
        path = split_dir / entry["url"]
        records = np.load(members_path(path))
        with tarfile.open(path) as tar:
            payloads = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        written = []
        with path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for record in records:
                key = record["key"].decode()
                parts = change(key, payloads[f"{key}.jpg"], payloads[f"{key}.png"])
                places: list[int] = []
                for suffix, payload in zip((".jpg", ".png"), parts, strict=True):
                    info = tarfile.TarInfo(key + suffix)
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))
                    start = file.tell() - -(-len(payload) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    places += [start, len(payload), crc32(payload)]
                written.append((record["key"], *places, record["height"], record["width"]))
        np.save(members_path(path), np.array(written, member_dtype(records.dtype["key"].itemsize)))
        for field, of in (("", path), ("members_", members_path(path))):
            entry[f"{field}filesize"] = of.stat().st_size
            entry[f"{field}sha256"] = hashlib.sha256(of.read_bytes()).hexdigest()
    (split_dir / "index.json").write_text(json.dumps(index | index_fields))


def rewrite_records(
    split_dir: Path, tar_name: str, change: Callable[["np.ndarray[tuple[int], np.dtype[np.void]]"], None]
) -> None:
    """Change the member records of one shard, and state their new digest in the index."""
    path = members_path(split_dir / tar_name)
    records = np.load(path)
    change(records)
    np.save(path, records)
    index = json.loads((split_dir / "index.json").read_text())
    entry = next(entry for entry in index["shardlist"] if entry["url"] == tar_name)
    entry["members_filesize"] = path.stat().st_size
    entry["members_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (split_dir / "index.json").write_text(json.dumps(index))
