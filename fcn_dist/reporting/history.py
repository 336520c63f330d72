"""What was run, on what, and how to run it again."""

import json
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fcn_dist.errors import counted
from fcn_dist.reporting.classes import per_cent
from fcn_dist.reporting.markup import Html, Part, element, join, table
from fcn_dist.reporting.rundata import Line, RunData, last, values
from fcn_dist.sizes import show_size
from fcn_dist.training.runfolder import METRICS_NAME

COMMAND = "fcn-dist train"  # how the installed package's command calls itself


def figures(run: RunData) -> dict[str, str]:
    """The run's final figures, by name, as people read them."""
    iou, accuracy = (values(run.scored, "official", key) for key in ("mean_iou", "pixel_accuracy"))
    speed, waits = values(run.trained, "images_per_second"), values(run.trained, "data_wait")
    memory = values(run.trained, "peak_memory")
    best = int(np.nanargmax(iou)) if np.isfinite(iou).any() else None
    return {
        "mean IoU": per_cent(last(iou), 2),
        "pixel accuracy": per_cent(last(accuracy), 2),
        "best mean IoU": "-" if best is None else f"{per_cent(float(iou[best]), 2)} at step {run.scored[best]['step']}",
        "loss": last_loss(run),
        "steps": f"{run.steps:,} of {run.planned:,}" if run.recorded else "-",
        "time on record": duration(run.seconds),
        "images per second, median": f"{np.nanmedian(speed):.1f}" if np.isfinite(speed).any() else "-",
        "peak memory of a rank": show_size(int(np.nanmax(memory))) if np.isfinite(memory).any() else "-",
        "waiting for data, mean": per_cent(float(np.nanmean(waits))) if np.isfinite(waits).any() else "-",
        "ranks": str(run.starts[-1].get("world_size") if run.starts else run.record.world_size),
    }


def last_loss(run: RunData) -> str:
    """The last on record; where none is finite any more, the last that was, with its step."""
    losses, steps = values(run.trained, "loss"), values(run.trained, "step")
    finite = np.isfinite(losses)
    if not finite.any():
        return "not finite" if run.trained or run.skipped else "-"
    loss, step = losses[finite][-1], steps[finite][-1]
    if finite[-1] and all(skipped <= step for skipped in run.skipped):
        return f"{loss:.4f}"
    return f"not finite; {loss:.4f} at step {step:,.0f}"


def duration(seconds: float) -> str:
    """In the two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def moment(seconds: float | None) -> str:
    """In universal time, to the minute."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def state(run: RunData) -> str:
    """Whether it is done, in words."""
    if not run.recorded:
        return f"Nothing is on record: {run.folder / METRICS_NAME} {_without_events(run.folder / METRICS_NAME)}."
    heard = f"last heard of {moment(run.last_time)}"
    if run.diverged:
        return (
            f"Training diverged and ended at step {run.steps:,} of {run.planned:,}: "
            f"{counted(len(run.skipped), 'step')} not finite, and train.max_skipped_steps allows "
            f"{run.allowed_skips:,}; {heard}."
        )
    if run.finished:
        return f"Trained to its last step, {run.planned:,}; {heard}."
    return f"At step {run.steps:,} of {run.planned:,}, going on or stopped there; {heard}."


def _without_events(path: Path) -> str:
    """What there is of a journal that tells nothing."""
    if not path.exists():
        return "is missing"
    return "tells of no start and no step" if path.stat().st_size else "is empty"


def again(command: str, ranks: int) -> str:
    """What a shell takes to start that many ranks as `command`, the arguments of one of them, was started."""
    words = [word for word in shlex.split(command) if not word.startswith("--local_rank")]
    if words[:1] == [COMMAND]:
        more = [] if "--ranks" in words or ranks == 1 else ["--ranks", str(ranks)]
        return shlex.join([*COMMAND.split(), *words[1:], *more])
    return shlex.join(["deepspeed", "--num_gpus", str(ranks), *words] if ranks > 1 else ["python", *words])


def _enter(start: Line) -> str:
    """What a shell takes to go to the folder that a start was made in, where it is on record."""
    folder = start.get("folder")
    return f"{shlex.join(['cd', str(folder)])}\n" if folder else ""


def how_to_run_again(run: RunData) -> Html:
    """Every start, and what it was started from."""
    record = run.record
    told = {"world_size": record.world_size, "command": record.command, "folder": record.folder}
    starts = run.starts or [{"step": 0, "time": None, **told}]
    parts: list[Part] = []
    for start in starts:
        ranks, command = int(start.get("world_size", 1)), str(start.get("command", ""))
        when = f" on {moment(start['time'])}" if start["time"] else ""
        begun = "Begun" if start is starts[0] else "Begun anew"
        if start["step"]:
            begun = f"Continued after step {start['step']:,}"
        parts += [
            element("p", f"{begun}{when}, with {counted(ranks, 'rank')}:"),
            element("pre", element("code", _enter(start), again(command, ranks)), tabindex="0"),
            element("details", element("summary", "What its first rank was told"), element("code", command)),
        ]
    parts.append(
        element(
            "p",
            "On several hosts, give the launcher its hostfile in place of a number.",
            class_="small",
        )
    )
    return join([*parts, table(("", ""), origins(run), class_="facts")])


def origins(run: RunData) -> list[tuple[Part, Part]]:
    """Code, data and machine."""
    record = run.record
    git = record.git
    changed = "" if git.get("clean", True) else ", with changes that were not committed"
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    machine = record.machine
    cut = [record.deepspeed.get(key) for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    rows: list[tuple[Part, Part]] = [
        ("run folder", str(run.folder.resolve())),
        (
            "code",
            f"commit {git['commit']}{changed}" if git.get("commit") else "an installed package, without its history",
        ),
        ("versions", versions),
        ("machine", f"{machine.get('host')}, {machine.get('cores')} cores, {machine.get('system')}"),
        ("shards", record.shards),
    ]
    rows += [(f"index of {split}", element("code", digest)) for split, digest in record.index_sha256.items()]
    rows.append(
        (
            "global batch",
            f"{record.global_batch} = {counted(record.world_size, 'rank')} x micro-batch {cut[0]} x accumulation "
            f"{cut[1]}, at the first start",
        )
    )
    incidents = [f"{name} ({count})" for name, count in sorted(run.others.items()) if name != "checkpoint"]
    incidents += [f"lines that could not be read ({run.unread})"] if run.unread else []
    rows.append(("checkpoints written", str(run.others["checkpoint"]) if run.recorded else "-"))
    rows.append(("events besides", ", ".join(incidents) or "none"))
    return rows


def settings(record: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Every value of a tree by its dotted key, as JSON."""
    found: dict[str, str] = {}
    for key, value in record.items():
        if isinstance(value, dict) and value:
            found |= settings(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value)
    return found


def configuration(run: RunData) -> dict[str, str]:
    """What the run computes with, by key: the recipe's own names, DeepSpeed's, and what else tells runs apart."""
    record = run.record
    return {
        **settings(record.recipe),
        **settings(record.deepspeed, "deepspeed."),
        "steps": str(record.steps),
        "world_size": str(record.world_size),
        "shards": record.shards,
        **settings(record.index_sha256, "index_sha256."),
        **settings(record.versions, "versions."),
        "git.commit": str(record.git.get("commit", "-")),
        "machine.host": str(record.machine.get("host", "-")),
    }


def configuration_table(runs: Sequence[RunData]) -> Html:
    """One run's configuration, folded."""
    rows = [(key, value) for key, value in configuration(runs[0]).items()]
    return element(
        "details", element("summary", f"All {len(rows)} values"), table(("key", "value"), rows, class_="keys")
    )
