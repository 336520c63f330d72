"""A scenes folder in; one shard set a split out: tar shards, and index.json last.

What was finished when a run ended is kept, and the next run goes on from there.
"""

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fcn_dist.data.packing.pack_shard import ShardJob, ShardResult, finished, pack_shard
from fcn_dist.data.packing.plan import PackOptions, Part, SplitPlan, plan_shards
from fcn_dist.data.packing.unfinished import (
    claimed,
    close_work,
    refuse_finished,
    remove_if_empty,
    remove_leftovers,
    write_plan,
)
from fcn_dist.data.packing.write_index import write_index
from fcn_dist.data.scenes.class_info import read_classes, read_colours
from fcn_dist.data.scenes.listing import IMAGE_DIR, MASK_DIR, Problem, find_pairs, refuse
from fcn_dist.data.scenes.pairs import DEFAULT_MAX_PIXELS, DEFAULT_QUALITY
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.workers import check_workers, map_in_processes
from fcn_dist.errors import UserError

DEFAULT_SPLITS = ("training", "validation")


@dataclass(frozen=True)
class PackReport:
    """What a run of packing has done."""

    shard_sets: list[ShardSet]  # none if it packed a part
    samples: int  # in the shards of this run
    shards: int
    kept: int  # of these shards, were finished before


def pack(
    scenes: Path | str,
    out: Path | str,
    splits: Sequence[str] = DEFAULT_SPLITS,
    *,
    samples_per_shard: int | None = None,
    shard_size: int | None = None,
    seed: int = 0,
    keep_order: bool = False,
    short_side: int | None = None,
    quality: int = DEFAULT_QUALITY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    workers: int | None = None,
    part: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> list[ShardSet]:
    """Pack `splits` of the scenes folder into `out/SPLIT/`, and return them in the same order.

    A shard holds `samples_per_shard` samples (256 if nothing is said), or as many as fit `shard_size` bytes. Samples
    stand in an order drawn from `seed`, or in that of their names with `keep_order`. Scenes whose short side is
    longer than `short_side` are shrunk to it. The same scenes and options give the same bytes with any number of
    `workers`, and however often packing was interrupted: the same call goes on with the shards that are left.

    `part=(i, n)` packs every n-th shard only, and writes no index: `merge` does that once all n parts are there.

    More than one worker starts processes, so a script that calls this needs the usual `if __name__ == "__main__"`.
    Raises UserError for what is wrong with the scenes, the options or the disk.
    """
    options = PackOptions(samples_per_shard, shard_size, seed, keep_order, short_side, quality, max_pixels)
    of_part = Part.of(*part) if part else None
    return pack_scenes(Path(scenes), Path(out), splits, options, workers, of_part, overwrite).shard_sets


def pack_scenes(
    scenes_dir: Path,
    out_dir: Path,
    splits: Sequence[str],
    options: PackOptions,
    workers: int | None = None,
    part: Part | None = None,
    overwrite: bool = False,
) -> PackReport:
    """As `pack`; says what was done."""
    workers = check_workers(workers)
    if not scenes_dir.is_dir() or not any(scenes_dir.iterdir()):
        state = "is empty" if scenes_dir.is_dir() else "is no folder"
        raise UserError(
            f"{scenes_dir} {state}; a folder with images/SPLIT, annotations/SPLIT and objectInfo150.txt is needed; "
            "check the path"
        )
    _check_destinations(scenes_dir, out_dir, splits)
    plans, problems = _plan(scenes_dir, splits, options)
    for plan in plans:
        refuse_finished(out_dir / plan.split, plan.noted(), overwrite)
    if problems:
        jobs = [job for plan in plans for job in _jobs(out_dir, plan, None, write=False)]
        for result in _run(jobs, workers):
            problems += result.problems
        refuse(scenes_dir, problems, "nothing was written")
    with _claims(out_dir, plans, part, overwrite):
        return _pack(scenes_dir, out_dir, plans, part, workers)


def _plan(scenes_dir: Path, splits: Sequence[str], options: PackOptions) -> tuple[list[SplitPlan], list[Problem]]:
    classes = read_classes(scenes_dir)
    colours = read_colours(scenes_dir, len(classes))
    plans: list[SplitPlan] = []
    problems: list[Problem] = []
    for split in splits:
        pairs, more = find_pairs(scenes_dir, split)
        problems += more
        shards = plan_shards(split, pairs, options, options.rules(len(classes)))
        plans.append(SplitPlan(split, options, classes, colours, shards))
    return plans, problems


def _pack(scenes_dir: Path, out_dir: Path, plans: list[SplitPlan], part: Part | None, workers: int) -> PackReport:
    jobs = [job for plan in plans for job in _jobs(out_dir, plan, part, write=True)]
    with _disk_errors(out_dir, jobs):
        for plan in plans:
            remove_leftovers(out_dir / plan.split, len(plan.shards), part)
            write_plan(out_dir / plan.split, plan.noted())
        try:
            results = _run(jobs, workers)
        finally:
            # Workers that were ended have left what they were writing.
            for plan in plans:
                remove_leftovers(out_dir / plan.split, len(plan.shards), part)
        done = {job.path: result for job, result in zip(jobs, results, strict=True) if result.receipt}
        problems = [problem for result in results for problem in result.problems]
        refuse(scenes_dir, problems, f"{len(done)} of {len(jobs)} shards are finished and kept")
        if part is None:
            for plan in plans:
                split_dir = out_dir / plan.split
                receipts = [done[split_dir / shard.name].receipt for shard in plan.shards]
                write_index(split_dir, plan.noted(), [receipt for receipt in receipts if receipt])
            # Only now: a run that ends before goes on with all splits alike.
            for plan in plans:
                close_work(out_dir / plan.split)
    shard_sets = [] if part else [ShardSet.open(out_dir, plan.split) for plan in plans]
    kept = sum(result.kept for result in results)
    return PackReport(shard_sets, sum(len(job.plan.pairs) for job in jobs), len(jobs), kept)


def _jobs(out_dir: Path, plan: SplitPlan, part: Part | None, write: bool) -> list[ShardJob]:
    rules = plan.options.rules(len(plan.classes))
    return [
        ShardJob(out_dir / plan.split, shard, rules, str(part or ""), write)
        for number, shard in enumerate(plan.shards)
        if part is None or part.has(number)
    ]


def _run(jobs: list[ShardJob], workers: int) -> list[ShardResult]:
    title = "packing" if all(job.write for job in jobs) else "checking"
    return map_in_processes(pack_shard, jobs, workers, title, [len(job.plan.pairs) for job in jobs])


@contextmanager
def _claims(out_dir: Path, plans: list[SplitPlan], part: Part | None, overwrite: bool) -> Iterator[None]:
    """Hold the folders of all splits; if nothing comes of it, leave none that was not there before."""
    with ExitStack() as claims:
        made: dict[Path, list[Path]] = {}
        try:
            for plan in plans:
                split_dir = out_dir / plan.split
                missing = [folder for folder in (split_dir, *split_dir.parents) if not folder.exists()]
                try:
                    claims.enter_context(claimed(split_dir, plan.noted(), part, overwrite))
                except OSError as error:
                    raise _unwritable(split_dir, error) from error
                made[split_dir] = missing
            yield
        except BaseException:
            # Other parts may be at work in the same folder.
            if part is None:
                for split_dir in reversed(made):
                    remove_if_empty(split_dir, made[split_dir])
            raise


def _check_destinations(scenes_dir: Path, out_dir: Path, splits: Sequence[str]) -> None:
    if not splits or len(set(splits)) != len(splits):
        raise UserError(f"the splits are {', '.join(splits) or 'none'}; at least one, each once, is needed")
    for split in splits:
        if not split or Path(split).name != split or split.startswith("."):
            raise UserError(f"the split {split!r} is no folder's name; name a folder under {scenes_dir / IMAGE_DIR}")
        folder = (out_dir / split).resolve()
        for kind in (IMAGE_DIR, MASK_DIR):
            if folder.is_relative_to((scenes_dir / kind).resolve()):
                raise UserError(f"{out_dir} lies within the scenes' {kind}; choose a folder outside of it")


@contextmanager
def _disk_errors(out_dir: Path, jobs: list[ShardJob]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        left = [job for job in jobs if not finished(job)]
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = sum(job.plan.num_bytes for job in left)
            free = shutil.disk_usage(out_dir).free
            raise UserError(
                f"the disk of {out_dir} is full: about {needed / 1e6:.1f} MB are needed for the {len(left)} of "
                f"{len(jobs)} shards that are left, {free / 1e6:.1f} MB are free; free some, and the same command goes "
                f"on (the {len(jobs) - len(left)} finished shards are kept), or choose a folder on another disk"
            ) from error
        if error.errno == errno.EFBIG:
            raise UserError(
                f"{out_dir} takes no file as large as a shard ({error}); choose fewer --samples-per-shard, a smaller "
                "--shard-size, or a folder on another disk"
            ) from error
        raise _unwritable(out_dir, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder} cannot be written ({error}); choose a folder that this account can write")
