"""A run as Weights & Biases keeps it on disk, read without its own code but for the messages: a log as LevelDB's is."""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER, FILE_HEADER = 32768, 7, b":W&B\xe1\xbe\x00"


@dataclass
class Found:
    """What a file tells of a run."""

    id: str = ""
    project: str = ""
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # by step
    steps: list[int] = field(default_factory=list)  # as they come
    finished: bool = False


def folders(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*"))


def read_run(folder: Path) -> Found:
    (path,) = folder.glob("run-*.wandb")
    found = Found()
    for data in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                found.id, found.project, found.name = record.run.run_id, record.run.project, record.run.display_name
                found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            case "history":
                row = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                found.steps.append(row["_step"])
                found.history.setdefault(row["_step"], {}).update(row)
            case "exit":
                found.finished = True
    return found


def records(path: Path) -> Iterator[bytes]:
    """Each is in one piece (1), or begun (2), continued (3) and ended (4); no header lies across two blocks."""
    data, at, parts = path.read_bytes(), len(FILE_HEADER), b""
    assert data.startswith(FILE_HEADER)
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        payload = data[at + HEADER : at + HEADER + length]
        assert zlib.crc32(bytes([kind]) + payload) == checksum and kind in (1, 2, 3, 4)
        parts = parts + payload if kind in (3, 4) else payload
        if kind in (1, 4):
            yield parts
        at += HEADER + length
