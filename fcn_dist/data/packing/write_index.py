"""The plan of a split and the receipts of all of its shards in; index.json out, which makes the folder a shard set."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fcn_dist.data.packing.receipts import RECORDED_KEYS, Receipt, shard_entry
from fcn_dist.data.pixel_counts import PixelCounts
from fcn_dist.data.shard import INDEX_NAME
from fcn_dist.data.shardset import FORMAT_VERSION, INDEX_KIND
from fcn_dist.data.shardtable import HEAD_SIZE, TABLE_NAME, records_of, totals_of, write_table
from fcn_dist.files import replacing, write_text


def write_index(split_dir: Path, plan: dict[str, Any], receipts: Sequence[Receipt]) -> None:
    """Write what ShardSet.open reads, a superset of webdataset's wids-shard-index-v1.

    `plan` is as SplitPlan.noted gives it, `receipts` are in the order of the shards.
    """
    counts = PixelCounts.zero(len(plan["classes"]))
    for receipt in receipts:
        counts.add(receipt.counts)
    mean, std = counts.mean_and_std()
    index = {
        "__kind__": INDEX_KIND,
        "wids_version": 1,
        "format_version": FORMAT_VERSION,
        "name": plan["split"],
        "shardlist": [shard_entry(receipt.shard) for receipt in receipts],
        "num_samples": sum(receipt.shard.num_samples for receipt in receipts),
        "classes": plan["classes"],
        "colours": plan["colours"],
        "label_rule": {"other": 0, "first": 1, "last": len(plan["classes"])},
        "class_pixels": counts.class_pixels.tolist(),
        "class_images": counts.class_images.tolist(),
        "channel_mean": mean,
        "channel_std": std,
        "max_pixels": plan["max_pixels"],
        "created_by": {
            "fcn_dist": plan["made_with"]["fcn_dist"],
            "options": plan["options"],
            "conversions": _conversions(receipts),
        },
    }
    write_fields(split_dir, index)


def write_fields(split_dir: Path, index: dict[str, Any]) -> None:
    """Write an index, and the table of its shards beside it if it is long."""
    text = _text(index)
    if len(text) > HEAD_SIZE:
        records = records_of(index["shardlist"])
        with replacing(split_dir / TABLE_NAME) as partial:
            digest, size = write_table(partial, records), partial.stat().st_size
        text = _text({**index, "shard_table": {"filesize": size, "sha256": digest, "totals": totals_of(records)}})
    write_text(split_dir / INDEX_NAME, text)


def _text(index: dict[str, Any]) -> str:
    """One field a line, so that a person can read it and a list of 150 numbers does not fill three screens.

    The shards, which may be many, come last.
    """
    names = sorted(index, key=lambda name: (name == "shardlist", name))
    fields = (f"{json.dumps(name)}: {json.dumps(index[name], sort_keys=True)}" for name in names)
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _conversions(receipts: Sequence[Receipt]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for receipt in receipts:
        for kind, (times, keys) in receipt.conversions.items():
            entry = joined.setdefault(kind, {"count": 0, "keys": []})
            entry["count"] += times
            entry["keys"] = sorted([*entry["keys"], *keys])[:RECORDED_KEYS]
    return dict(sorted(joined.items()))
