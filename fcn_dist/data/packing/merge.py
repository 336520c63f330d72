"""Parts of a set, packed by several runs, in; the shard set that one run would have made out."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any

from fcn_dist.data.diskspace import writing
from fcn_dist.data.packing.plan import Part
from fcn_dist.data.packing.receipts import WORK_DIR, Receipt, has_bytes, read_receipt
from fcn_dist.data.packing.unfinished import PLAN_NAME, claimed, close_work, read_plan, refuse_finished, write_plan
from fcn_dist.data.packing.write_index import write_index
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.workers import Advance, check_workers, map_in_processes
from fcn_dist.errors import UserError, named
from fcn_dist.files import replacing

_MEANINGS = {
    "made_with": "another version of a library",
    "options": "other options",
    "max_pixels": "another --max-pixels",
    "classes": "other classes in the objectInfo file",
    "colours": "other colours in color150.mat",
    "shards": "other scenes (a file more or less, or one of another size)",
}


@dataclass(frozen=True)
class _Found:
    """The plan of one split, and where each of its shards is."""

    split_dir: Path  # in the folder that is merged into
    plan: dict[str, Any]
    receipts: tuple[Receipt, ...]


@dataclass(frozen=True)
class _Take:
    """One shard to check where it is, or to copy to where it shall be."""

    receipt: Receipt
    folder: Path


def merge(out: Path | str, *sources: Path | str, workers: int | None = None) -> list[ShardSet]:
    """Write the index of each split that was packed in parts, once all of its shards are there.

    Shards that are not in `out` are copied from `sources`, folders that other parts were packed into. All are
    compared with their hashes. Raises UserError that names what is missing or does not belong together; then no
    index is written.
    """
    out_dir, folders = Path(out), [Path(folder) for folder in (out, *sources)]
    workers = check_workers(workers)
    splits = sorted({path.parents[1].name for folder in folders for path in folder.glob(f"*/{WORK_DIR}/{PLAN_NAME}")})
    if not splits:
        looked = named([str(folder) for folder in folders])
        raise UserError(
            f"{looked}: no folder in there holds parts of a set (SPLIT/{WORK_DIR}/{PLAN_NAME}, as create --part leaves "
            "it, and merge removes once the index is written); name the folders that parts were packed into"
        )
    found = [_find(split, out_dir, folders) for split in splits]
    for one in found:
        _merge_split(one, workers)
    # Only now: a merge that ends before goes on with all splits alike.
    for one in found:
        close_work(one.split_dir)
    return [ShardSet.open(out_dir, split) for split in splits]


def _find(split: str, out_dir: Path, folders: list[Path]) -> _Found:
    plans = {folder / split: plan for folder in folders if (plan := read_plan(folder / split)) is not None}
    (first, plan), *others = plans.items()
    for other, its_plan in others:
        differences = [meaning for name, meaning in _MEANINGS.items() if plan[name] != its_plan[name]]
        if differences:
            raise UserError(
                f"{other} was planned with {' and '.join(differences)} than {first}; parts of one plan are needed; "
                "pack those parts again with the same command, scenes and environment"
            )
    refuse_finished(out_dir / split, plan, overwrite=False)
    receipts = []
    strange: list[tuple[int, Receipt]] = []
    missing: list[int] = []
    for number, shard in enumerate(plan["shards"]):
        candidates = [receipt for folder in plans if (receipt := read_receipt(folder / shard["name"]))]
        fitting = [receipt for receipt in candidates if receipt.content == shard["content"]]
        if fitting:
            receipts.append(fitting[0])
        elif candidates:
            strange.append((number, candidates[0]))
        else:
            missing.append(number)
    if strange or missing:
        raise UserError(_incomplete(out_dir / split, plan, [*receipts, *(r for _, r in strange)], missing, strange))
    return _Found(out_dir / split, plan, tuple(receipts))


def _incomplete(
    split_dir: Path,
    plan: dict[str, Any],
    known: list[Receipt],
    missing: list[int],
    strange: list[tuple[int, Receipt]],
) -> str:
    total, lines = len(plan["shards"]), []
    if missing:
        lines.append(f"{len(missing)} of {total} shards are missing: {_by_part(missing, plan, known)}")
    if strange:
        numbers = [number for number, _ in strange]
        lines.append(
            f"{len(strange)} of {total} shards were packed from other files, or otherwise, than the plan says: "
            f"{_by_part(numbers, plan, known)}"
        )
    return (
        f"{split_dir} cannot be merged: {'; '.join(lines)}; all shards of one plan are needed; run create with these "
        "parts to its end, and name the folders it packed into"
    )


def _by_part(numbers: list[int], plan: dict[str, Any], known: list[Receipt]) -> str:
    """The shards by the part that packs them, as far as the shards that are there tell how many parts there are."""
    names = [plan["shards"][number]["name"] for number in numbers]
    totals = {receipt.part.rpartition("/")[2] for receipt in known}
    total = totals.pop() if len(totals) == 1 else ""
    if not total:
        return named(names)
    parts = Counter(number % int(total) + 1 for number in numbers)
    return ", ".join(
        f"{count} of part {Part(part, int(total))} "
        f"({named([n for n, number in zip(names, numbers, strict=True) if number % int(total) + 1 == part])})"
        for part, count in sorted(parts.items())
    )


def _merge_split(found: _Found, workers: int) -> None:
    split_dir = found.split_dir
    elsewhere = [receipt.shard for receipt in found.receipts if receipt.shard.path.parent != split_dir]
    needed = sum(shard.size + shard.members_size for shard in elsewhere)
    with writing(split_dir, needed), claimed(split_dir, found.plan, None, overwrite=False):
        write_plan(split_dir, found.plan)
        jobs = [_Take(receipt, split_dir) for receipt in found.receipts]
        samples = [receipt.shard.num_samples for receipt in found.receipts]
        problems = [one for one in map_in_processes(_take, jobs, workers, f"merging {split_dir.name}", samples) if one]
        if problems:
            raise UserError(
                f"{split_dir} cannot be merged: {len(problems)} file{'s' * (len(problems) > 1)} are not as they were "
                f"packed: {named(problems)}; run create with their parts again, which packs what is damaged"
            )
        write_index(split_dir, found.plan, found.receipts)


def _take(job: _Take, advance: Advance) -> str:
    """Bring one shard to its place; returns the file that is not as its receipt says, if there is one."""
    shard = job.receipt.shard
    stated = {shard.path: (shard.size, shard.sha256), shard.members_path: (shard.members_size, shard.members_sha256)}
    for source, facts in stated.items():
        target = job.folder / source.name
        if has_bytes(target, *facts):
            continue
        if source == target:
            return str(source)
        with replacing(target) as partial:
            try:
                copyfile(source, partial)
            except FileNotFoundError:
                return str(source)
            if not has_bytes(partial, *facts):
                return str(source)
            advance(0)
    if shard.path.parent != job.folder:
        job.receipt.moved(job.folder).write()
    return ""
