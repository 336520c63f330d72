"""One whole training as its users start it in, its scores, time, memory and curves out."""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from launched import ROOT, launch
from measure import Contender, Measured

from fcn_dist.console import status_console
from fcn_dist.data.packing.run import pack
from fcn_dist.data.shard import INDEX_NAME
from fcn_dist.errors import UserError

LIMIT = 3600.0  # seconds for one training
POINTS = 10  # of a curve
ALWAYS = "evaluate.at_end=true"
RECIPES = ROOT / "launch" / "recipes"
CPU_RANKS = 2


@dataclass(frozen=True)
class Training:
    """A row of a table: a recipe, what is set otherwise, and on how many ranks of the machine."""

    name: str
    recipe: Path
    settings: tuple[str, ...] = ()
    does: str = ""
    page: Path | None = None  # where a report of the run is to be written

    @property
    def ranks(self) -> int:
        """One GPU, or as many processes as there are cores, up to two."""
        return 1 if torch.cuda.is_available() else min(CPU_RANKS, len(os.sched_getaffinity(0)))

    def run(self, shards: Path, scratch: Path) -> dict[str, Any]:
        """Train in `LIMIT` seconds at most; figures by name, or {"problem": ...}."""
        precision = "bf16" if torch.cuda.is_available() else "fp32"
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            out = Path(folder) / "run"
            command = [str(ROOT / "launch" / "train.py"), "--shards", str(shards), "--output", str(out)]
            command += ["--recipe", str(self.recipe)]
            command += ["--deepspeed_config", str(ROOT / "launch" / "zero" / f"zero1_{precision}.json")]
            command += [word for setting in (*self.settings, ALWAYS) for word in ("--set", setting)]
            began = perf_counter()
            problem = launch(command, self.ranks, Path(folder), LIMIT)
            if problem:
                return {"problem": problem}
            if self.page:
                from fcn_dist.reporting.report import write_report

                write_report([out], self.page)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            return {"seconds": perf_counter() - began} | figures(lines)


def figures(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a run's journal says of it."""
    trained = [line for line in lines if line["event"] == "train" and line["loss"] is not None]
    scored = [line for line in lines if line["event"] == "evaluate"]
    last = scored[-1]
    return {
        "mean IoU": 100 * last["official"]["mean_iou"],
        "pixel accuracy": 100 * last["official"]["pixel_accuracy"],
        "mean accuracy": 100 * last["paper"]["mean_accuracy"],
        "steps": trained[-1]["step"],
        "images/s": median(line["images_per_second"] for line in trained),
        "data wait": median(line["data_wait"] for line in trained),
        "peak GB": max(line["peak_memory"] for line in trained) / 1e9,
        "losses": curve(trained),
        "scores": [(line["step"], 100 * line["official"]["mean_iou"]) for line in scored],
        "gradients": [(line["step"], gradient_norms(line["layers"])) for line in lines if line["event"] == "layers"],
    }


def gradient_norms(layers: dict[str, Any]) -> dict[str, float]:
    """By parameter; 0 where it was not finite."""
    return {name: seen["gradient"]["norm"] or 0.0 for name, seen in layers.items()}


def curve(trained: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """Steps and mean losses of `POINTS` equal parts of the run, or fewer."""
    points = min(POINTS, len(trained))
    parts = [trained[len(trained) * i // points : len(trained) * (i + 1) // points] for i in range(points)]
    return [(part[-1]["step"], sum(line["loss"] for line in part) / len(part)) for part in parts]


def measured(trainings: Sequence[Training], shards: Path, scratch: Path) -> list[Measured]:
    """Each training once, one after the other; after Ctrl-C, those that are done."""
    found = []
    for number, training in enumerate(trainings, 1):
        status_console.print(f"{number} of {len(trainings)}: {training.name}")
        try:
            result = training.run(shards, scratch)
        except KeyboardInterrupt:
            status_console.print("interrupted; what is done is reported")
            break
        contender = Contender(training.name, "launch/train.py", {"settings": training.settings}, training.does)
        problem = str(result.get("problem", ""))
        found.append(Measured(contender, [] if problem else [result], problem))
        status_console.print(problem or f"mean IoU {result['mean IoU']:.2f} % after {result['seconds']:.0f} s")
    return found


def options(doc: str | None) -> argparse.ArgumentParser:
    """What both benchmarks take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("camvid", type=Path, metavar="CAMVID", help="folder of scenes, or of shards")
    add("--weights", type=Path, required=True, metavar="FILE", help="VGG16's convolutions")
    add("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="of the recipe, otherwise")
    add("--output", type=Path, default=Path("benchmark-reports"), metavar="DIR", help="default: %(default)s")
    return parser


def check_weights(path: Path) -> None:
    """Raise UserError if there is no such file."""
    if not path.is_file():
        raise UserError(f"{path} is no file; VGG16's convolutions are needed; give --weights a file that is there")


def end(trainings: Sequence[Training], found: Sequence[Measured]) -> None:
    """Exit with 1 unless every training has its figures."""
    if len(found) < len(trainings) or any(one.problem for one in found):
        raise SystemExit(1)


def device() -> tuple[str, str]:
    """The device's name, and what reports are called by it."""
    return (torch.cuda.get_device_name(), "cuda") if torch.cuda.is_available() else ("CPU", "cpu")


def shards_of(folder: Path, scratch: Path, short_side: int | None) -> Path:
    """A folder of shard sets as it is; a folder of scenes packed first. Raises UserError if it is neither."""
    if (folder / "training" / INDEX_NAME).exists():
        return folder
    if not (folder / "images").is_dir():
        raise UserError(f"{folder} has neither training/{INDEX_NAME} nor images/; name a folder of shards or of scenes")
    pack(folder, scratch / "shards", short_side=short_side)
    return scratch / "shards"
