"""A scenes folder in; one shard set a split out: tar shards, and index.json last."""

import errno
import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fcn_dist
from fcn_dist.data.class_info import read_classes, read_colours
from fcn_dist.data.pairs import DEFAULT_MAX_PIXELS, DEFAULT_QUALITY, PairRules
from fcn_dist.data.pixel_counts import PixelCounts
from fcn_dist.data.scenes import IMAGE_DIR, MASK_DIR, CheckedPair, check_pairs, find_pairs, refuse
from fcn_dist.data.shardset import FORMAT_VERSION, INDEX_KIND, INDEX_NAME, Shard, ShardSet
from fcn_dist.data.tarshard import ShardJob, write_shard
from fcn_dist.data.workers import check_workers, map_in_processes
from fcn_dist.errors import UserError
from fcn_dist.files import write_text

DEFAULT_SPLITS = ("training", "validation")
DEFAULT_SAMPLES_PER_SHARD = 256
RECORDED_KEYS = 100  # of each kind of conversion; the index must not grow with the data set
_TAR_OVERHEAD = 2048  # bytes a pair: two headers and two paddings


@dataclass(frozen=True)
class PackOptions:
    """What decides the bytes of a shard set, besides the scenes; recorded in the index."""

    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD
    seed: int = 0
    keep_order: bool = False
    short_side: int | None = None
    quality: int = DEFAULT_QUALITY

    def __post_init__(self) -> None:
        for option, value in (("samples-per-shard", self.samples_per_shard), ("short-side", self.short_side)):
            if value is not None and value < 1:
                raise UserError(f"--{option} is {value}; at least 1 is needed")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}; JPEG qualities are 1 to 100, and 95 is the default")


def pack(
    scenes: Path | str,
    out: Path | str,
    splits: Sequence[str] = DEFAULT_SPLITS,
    *,
    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD,
    seed: int = 0,
    keep_order: bool = False,
    short_side: int | None = None,
    quality: int = DEFAULT_QUALITY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    workers: int | None = None,
    overwrite: bool = False,
) -> list[ShardSet]:
    """Pack `splits` of the scenes folder into `out/SPLIT/`, and return them in the same order.

    All pairs of all splits are checked first; nothing is written if one is wrong. Samples stand in an order drawn
    from `seed`, or in that of their names with `keep_order`. Scenes whose short side is longer than `short_side`
    are shrunk to it. The same scenes and options give the same bytes with any number of `workers`.

    More than one worker starts processes, so a script that calls this needs the usual `if __name__ == "__main__"`.
    Raises UserError for what is wrong with the scenes, the options or the disk.
    """
    scenes_dir, out_dir = Path(scenes), Path(out)
    options = PackOptions(samples_per_shard, seed, keep_order, short_side, quality)
    workers = check_workers(workers)
    if max_pixels < 1:
        raise UserError(f"--max-pixels is {max_pixels}; at least 1 is needed")
    if not scenes_dir.is_dir() or not any(scenes_dir.iterdir()):
        state = "is empty" if scenes_dir.is_dir() else "is no folder"
        raise UserError(
            f"{scenes_dir} {state}; a folder with images/SPLIT, annotations/SPLIT and objectInfo150.txt is needed; "
            "check the path"
        )
    classes = read_classes(scenes_dir)
    colours = read_colours(scenes_dir, len(classes))
    rules = PairRules(len(classes), max_pixels, short_side, quality)
    _check_destinations(scenes_dir, out_dir, splits, overwrite)

    found = {split: find_pairs(scenes_dir, split) for split in splits}
    problems = [problem for _, problems in found.values() for problem in problems]
    checked: dict[str, list[CheckedPair]] = {}
    for split, (pairs, _) in found.items():
        checked[split], more = check_pairs(pairs, rules, workers)
        problems += more
    refuse(scenes_dir, problems)

    for split, good in checked.items():
        ordered = good if keep_order else sorted(good, key=lambda c: _draw(seed, c.pair.key))
        _write_split(out_dir / split, ordered, rules, options, classes, colours, workers)
    return [ShardSet.open(out_dir, split) for split in splits]


def _draw(seed: int, key: str) -> bytes:
    # Sorting by a hash is a permutation that no library's random generator can change between versions.
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


def _check_destinations(scenes_dir: Path, out_dir: Path, splits: Sequence[str], overwrite: bool) -> None:
    if not splits or len(set(splits)) != len(splits):
        raise UserError(f"the splits are {', '.join(splits) or 'none'}; at least one, each once, is needed")
    for split in splits:
        if not split or Path(split).name != split or split.startswith("."):
            raise UserError(f"the split {split!r} is no folder's name; name a folder under {scenes_dir / IMAGE_DIR}")
        folder = (out_dir / split).resolve()
        for kind in (IMAGE_DIR, MASK_DIR):
            if folder.is_relative_to((scenes_dir / kind).resolve()):
                raise UserError(f"{out_dir} lies within the scenes' {kind}; choose a folder outside of it")
        if (folder / INDEX_NAME).exists() and not overwrite:
            raise UserError(
                f"{out_dir / split} already holds a shard set; choose another folder, or replace it with --overwrite"
            )


def _write_split(
    split_dir: Path,
    checked: list[CheckedPair],
    rules: PairRules,
    options: PackOptions,
    classes: tuple[str, ...],
    colours: tuple[tuple[int, int, int], ...],
    workers: int,
) -> None:
    split, step = split_dir.name, options.samples_per_shard
    jobs = [
        ShardJob(split_dir / f"{split}-{start // step:06d}.tar", tuple(checked[start : start + step]), rules)
        for start in range(0, len(checked), step)
    ]
    try:
        split_dir.mkdir(parents=True, exist_ok=True)
        _remove_shards(split_dir)
        results = map_in_processes(write_shard, jobs, workers, f"packing {split}", [len(job.pairs) for job in jobs])
        counts = PixelCounts.zero(rules.num_classes)
        for _, more in results:
            counts.add(more)
        index = _index(split, [shard for shard, _ in results], counts, classes, colours)
        index["max_pixels"] = rules.max_pixels
        index["created_by"] = {
            "fcn_dist": fcn_dist.__version__,
            "options": vars(options),
            "conversions": _conversions(checked),
        }
        write_text(split_dir / INDEX_NAME, _json(index))
    except BaseException as error:
        # Shards without an index are of no use to anyone, and would keep a full disk full.
        free = shutil.disk_usage(split_dir).free if split_dir.is_dir() else 0
        if split_dir.is_dir():
            _remove_shards(split_dir)
        if isinstance(error, OSError):
            raise _disk_error(error, split_dir, checked, free) from error
        raise


def _json(index: dict[str, Any]) -> str:
    """One field a line, so that a person can read it and a list of 150 numbers does not fill three screens."""
    fields = (f"{json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in sorted(index.items()))
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _remove_shards(split_dir: Path) -> None:
    """Remove what an earlier run wrote, the index first: a folder with an index is a whole shard set."""
    (split_dir / INDEX_NAME).unlink(missing_ok=True)
    name = re.escape(split_dir.name)
    ours = re.compile(
        rf"{name}-\d{{6,}}\.(tar|members\.npy)|\.({name}-\d{{6,}}\..+|{re.escape(INDEX_NAME)}\..+)\.partial"
    )
    for path in split_dir.iterdir():
        if ours.fullmatch(path.name):
            path.unlink()


def _disk_error(error: OSError, split_dir: Path, checked: list[CheckedPair], free: int) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = sum(c.num_bytes + _TAR_OVERHEAD for c in checked)
        return UserError(
            f"the disk of {split_dir} is full: about {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB were "
            "free when it failed; free some, or choose a folder on another disk (the partial shards were removed)"
        )
    return UserError(f"{split_dir} cannot be written ({error}); choose a folder that this account can write")


def _conversions(checked: list[CheckedPair]) -> dict[str, Any]:
    keys: dict[str, list[str]] = defaultdict(list)
    for one in checked:
        for kind in one.conversions:
            keys[kind].append(one.pair.key)
    return {kind: {"count": len(of), "keys": sorted(of)[:RECORDED_KEYS]} for kind, of in sorted(keys.items())}


def _index(
    split: str,
    shards: list[Shard],
    counts: PixelCounts,
    classes: tuple[str, ...],
    colours: tuple[tuple[int, int, int], ...],
) -> dict[str, Any]:
    """What ShardSet.open reads, as a superset of webdataset's wids-shard-index-v1."""
    mean, std = counts.mean_and_std()
    return {
        "__kind__": INDEX_KIND,
        "wids_version": 1,
        "format_version": FORMAT_VERSION,
        "name": split,
        "shardlist": [
            {
                "url": shard.path.name,
                "nsamples": shard.num_samples,
                "filesize": shard.size,
                "sha256": shard.sha256,
                "members_filesize": shard.members_size,
                "members_sha256": shard.members_sha256,
            }
            for shard in shards
        ],
        "num_samples": sum(shard.num_samples for shard in shards),
        "classes": classes,
        "colours": colours,
        "label_rule": {"other": 0, "first": 1, "last": len(classes)},
        "class_pixels": counts.class_pixels.tolist(),
        "class_images": counts.class_images.tolist(),
        "channel_mean": mean,
        "channel_std": std,
    }
