"""A folder of shard sets in; everything in it that is not as it was packed out."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fcn_dist.addresses import is_url
from fcn_dist.data.pixel_counts import PixelCounts
from fcn_dist.data.shard import INDEX_NAME
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.shardtable import TABLE_NAME, records_of
from fcn_dist.data.verifying.verify_shard import Problem, ShardCheck, printable, verify_shard
from fcn_dist.data.workers import check_workers, map_in_processes
from fcn_dist.errors import UserError


@dataclass
class SplitReport:
    """What verifying one split has shown."""

    split: str
    num_samples: int = 0
    num_shards: int = 0
    num_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)


def find_splits(out_dir: Path) -> list[Path]:
    """`out_dir` itself if it has an index, else its folders that have one; UserError if there are none."""
    if not out_dir.exists() and is_url(str(out_dir)):
        raise UserError(
            f"{out_dir} is an address in a store; a folder of this machine is needed; verify the set where it was "
            "packed (of a remote one, readers check each file and each sample themselves)"
        )
    if (out_dir / INDEX_NAME).exists():
        return [out_dir]
    folders = sorted(path.parent for path in out_dir.glob(f"*/{INDEX_NAME}"))
    if not folders:
        raise UserError(
            f"{out_dir} holds no shard set: neither it nor a folder in it has an {INDEX_NAME}; name a folder that "
            "shards/create.py has written (one without an index is unfinished: the same create command goes on with it)"
        )
    return folders


def verify(out: Path | str, deep: bool = False, workers: int | None = None) -> list[SplitReport]:
    """Compare every split in `out` with its index; with `deep`, also decode and recount every sample.

    Raises UserError only if there is nothing to verify; what is wrong stands in the reports.
    """
    workers = check_workers(workers)
    return [_verify_split(folder, deep, workers) for folder in find_splits(Path(out))]


def _verify_split(folder: Path, deep: bool, workers: int) -> SplitReport:
    report = SplitReport(folder.name)
    try:
        shard_set = ShardSet.open(folder)
    except UserError as error:
        report.problems.append(Problem(INDEX_NAME, "", str(error)))
        return report
    report.num_samples, report.num_shards = len(shard_set), len(shard_set.shards)
    report.num_bytes = sum(shard.size for shard in shard_set.shards)
    report.problems += _unlisted_files(shard_set)
    report.problems += _table_problems(shard_set)

    jobs = [ShardCheck(shard, len(shard_set.classes), shard_set.max_pixels, deep) for shard in shard_set.shards]
    samples = [shard.num_samples for shard in shard_set.shards]
    counts = PixelCounts.zero(len(shard_set.classes))
    shards_of_key: dict[str, list[str]] = {}
    all_findings = map_in_processes(verify_shard, jobs, workers, f"verifying {report.split}", samples)
    for shard, findings in zip(shard_set.shards, all_findings, strict=True):
        report.problems += findings.problems
        counts.add(findings.counts)
        for key in findings.keys:
            shards_of_key.setdefault(key, []).append(shard.path.name)
    for key, names in shards_of_key.items():
        if len(names) > 1:
            report.problems.append(
                Problem(names[-1], printable(key), f"the same key stands in {', '.join(names[:-1])} as well")
            )
    # Counts over damaged samples differ for certain, which would say nothing new.
    if deep and not report.problems:
        report.problems += _count_problems(shard_set, counts)
    return report


def _unlisted_files(shard_set: ShardSet) -> Iterator[Problem]:
    listed = {path.name for shard in shard_set.shards for path in (shard.path, shard.members_path)}
    for path in sorted(shard_set.dir.iterdir()):
        ours = path.name.endswith((".tar", ".members.npy", ".partial"))
        if ours and path.name not in listed:
            yield Problem(path.name, "", f"is not in {INDEX_NAME}: an extra shard, or one of an unfinished run")


def _table_problems(shard_set: ShardSet) -> Iterator[Problem]:
    """A long index is read by its table: here it is held against the list that other readers see."""
    path = shard_set.dir / TABLE_NAME
    try:
        listed = records_of(json.loads((shard_set.dir / INDEX_NAME).read_bytes())["shardlist"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Problem(INDEX_NAME, "", f"its list of shards cannot be read ({error!r})")
        return
    if not shard_set.shards.equal(listed):
        yield Problem(path.name, "", f"lists other shards than {INDEX_NAME} does")


def _count_problems(shard_set: ShardSet, counts: PixelCounts) -> Iterator[Problem]:
    for name in ("class_pixels", "class_images"):
        found = getattr(counts, name).tolist()
        for label, (stated, counted) in enumerate(zip(getattr(shard_set, name), found, strict=True)):
            if stated != counted:
                yield Problem(INDEX_NAME, "", f"{name} of label {label} is {stated}, the samples have {counted}")
    for name, measured in zip(("channel_mean", "channel_std"), counts.mean_and_std(), strict=True):
        said = getattr(shard_set, name)
        # JPEG decoders may differ by a level.
        if not np.allclose(said, measured, rtol=0, atol=1.0):
            yield Problem(INDEX_NAME, "", f"{name} is {said}, the samples have {measured}")
