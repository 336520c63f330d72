"""Who holds a stuck job up, and the report that says so: what ranks last said of themselves in, words out."""

from collections.abc import Mapping
from dataclasses import dataclass

from fcn_dist.errors import EXIT_STUCK, named
from fcn_dist.training.beats import Beat
from fcn_dist.training.phases import Phase

# With accumulation a rank that goes forward can be behind or ahead of one that goes backward.
ORDER = {phase: place for place, phase in enumerate(Phase)} | {Phase.BACKWARD: list(Phase).index(Phase.FORWARD)}


@dataclass(frozen=True)
class Verdict:
    """The ranks that hold the others up, none if they cannot be told, and the reason."""

    ranks: tuple[int, ...]
    reason: str


def judge(beats: Mapping[int, Beat], silent: Mapping[int, str], world_size: int) -> Verdict:
    """Blame ranks of a job in which none makes progress.

    `beats` are the last ones of all ranks that have any, `silent` those of them whose beats have stopped, with what is
    known of their processes. In this order, the ranks to blame are those whose beats have stopped; those from which
    nothing was heard; those furthest behind; of these, those that are not inside a collective while others are.
    """
    if silent:
        reason = named(sorted(set(silent.values())))
        return Verdict(tuple(sorted(silent)), f"{reason} (its place is that of its last beat)")
    unknown = tuple(rank for rank in range(world_size) if rank not in beats)
    if unknown:
        return Verdict(unknown, "nothing on record here: it has ended, or its run folder is another")
    places = {rank: (beat.step, ORDER[beat.phase]) for rank, beat in beats.items()}
    furthest_behind = min(places.values())
    behind = tuple(rank for rank in sorted(places) if places[rank] == furthest_behind)
    working = tuple(rank for rank in behind if not beats[rank].waits)
    if working and len(working) < world_size:
        return Verdict(working, "stuck")
    if len(behind) < world_size:
        return Verdict(behind, "waits for ranks that have gone on: what it waits for was lost on the way")
    if world_size == 1:
        return Verdict(behind, "stuck")
    return Verdict((), "all ranks are at the same place")


def report(beats: Mapping[int, Beat], verdict: Verdict, waited: float, stacks_dir: str, world_size: int) -> str:
    """The verdict, then where each rank is; ranks with the same stack together, those to blame first."""
    lines = [f"no rank has made progress for {waited:.0f} s (train.watchdog), so the job ends with code {EXIT_STUCK}:"]
    waiting = sorted({beat.where for rank, beat in beats.items() if rank not in verdict.ranks})
    for rank in verdict.ranks:
        where = f" {beats[rank].where}" if rank in beats else ""
        others = f"; the others wait {named(waiting)}" if waiting else ""
        lines.append(f"{_name(rank, beats)} holds the others up{where}: {verdict.reason}{others}")
    if world_size == 1:
        lines[1:] = [f"it is {beats[0].where}"] if 0 in beats else []
    elif not verdict.ranks:
        lines.append(f"which rank holds the others up cannot be told: {verdict.reason}")
    groups: dict[tuple[bool, str, tuple[str, ...]], list[int]] = {}
    for rank, beat in sorted(beats.items()):
        groups.setdefault((rank not in verdict.ranks, beat.where, beat.stack), []).append(rank)
    for (_, where, stack), ranks in sorted(groups.items(), key=lambda group: (group[0][0], group[1])):
        names = named([_name(rank, beats) for rank in ranks])
        lines += [f"{names}: {where} for {min(beats[rank].idle for rank in ranks):.0f} s at its last beat"]
        lines += [f"    {call}" for call in stack]
    lines.append(f"stacks of all threads are in {stacks_dir}; the run goes on from its last checkpoint with --resume")
    return "\n".join(lines)


def _name(rank: int, beats: Mapping[int, Beat]) -> str:
    if rank not in beats:
        return f"rank {rank}"
    process = beats[rank].process
    return f"rank {rank} (host {process.host}, pid {process.pid})"
