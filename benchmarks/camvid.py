"""FCN-8s on CamVid from ImageNet's VGG16 convolutions: scores over seeds, time, memory, curves, and what learns when.

    python benchmarks/camvid.py CAMVID --weights vgg16_conv_caffe.safetensors --output reports

CAMVID is a folder of scenes or of shards. The recipe is camvid.yaml on one GPU, and camvid_cpu.yaml where there is
none. Prints tables, and writes them as Markdown with every figure as JSON.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch
from measure import Measured
from report import Table, one_line, write_report
from training_run import RECIPES, Training, measured, shards_of

from fcn_dist.config import ModelConfig
from fcn_dist.console import run_command
from fcn_dist.data.shardset import ShardSet
from fcn_dist.errors import UserError
from fcn_dist.model.fcn import FCN
from fcn_dist.recipefile import load_recipe
from fcn_dist.training.schedule import total_steps

LIMIT = 3600.0  # seconds for one training
LOOKS = 50  # at the layers, of the first seed
PARTS = ("stage 1", "stage 2", "stage 3", "stage 4", "stage 5", "fc6 and fc7", "score layers")
SCORES = ("mean IoU", "pixel accuracy", "mean accuracy")
# Published for FCN-8s with ImageNet's VGG16 on CamVid's test split, which is another one.
PUBLISHED = ("published, test split", "57.0", "88.0")


def main(argv: list[str]) -> None:
    """Train and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("camvid", type=Path, metavar="CAMVID", help="folder of scenes, or of shards")
    add("--weights", type=Path, required=True, metavar="FILE", help="VGG16's convolutions")
    add("--recipe", type=Path, metavar="FILE", help="default: camvid.yaml on a GPU, camvid_cpu.yaml without")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="of the recipe, otherwise")
    add("--output", type=Path, default=Path("benchmark-reports"), metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    if not args.weights.is_file():
        raise UserError(f"{args.weights} is no file; VGG16's convolutions are needed (--weights)")
    on_gpu = torch.cuda.is_available()
    recipe = args.recipe or RECIPES / ("camvid.yaml" if on_gpu else "camvid_cpu.yaml")
    settings = [f"model.weights={args.weights.resolve()}", *args.settings]
    with tempfile.TemporaryDirectory() as scratch:
        shards = shards_of(args.camvid, Path(scratch), short_side=None)
        found = measured(trainings(recipe, settings, args.seeds, shards), shards, Path(scratch), LIMIT)
    model = load_recipe(recipe, settings).model
    facts = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "recipe": recipe.name,
        "network": f"{model.variant} on {model.backbone}, head of {model.head_width or 4096}",
    }
    tables = [scores_table(found), curves_table(found), *layers_tables(found, model)]
    write_report(args.output, f"camvid-{'cuda' if on_gpu else 'cpu'}", facts, tables, found)
    if any(one.problem for one in found):
        raise SystemExit(1)


def trainings(recipe: Path, settings: list[str], seeds: list[int], shards: Path) -> list[Training]:
    """One a seed; the first looks at its layers."""
    read = load_recipe(recipe, settings)
    samples = len(ShardSet.open(str(shards), "training"))
    steps = total_steps(read.schedule, samples, read.train.global_batch or 1)
    looks = [f"log.layers={max(1, steps // LOOKS)}"]
    return [
        Training(f"seed {seed}", recipe, (*settings, f"train.seed={seed}", *(looks if number == 0 else [])))
        for number, seed in enumerate(seeds)
    ]


def scores_table(found: list[Measured]) -> Table:
    """A row a seed, their mean and standard deviation, and what others published."""
    columns = ("", *(f"{name} %" for name in SCORES), "seconds", "steps", "images/s", "data wait", "peak GB")
    rows: list[tuple[str, ...]] = []
    for one in found:
        if one.problem:
            rows.append((one.contender.name, *("",) * (len(columns) - 2), one_line(one.problem)))
            continue
        (run,) = one.rounds
        cells = [f"{run[name]:.2f}" for name in SCORES]
        cells += [f"{run['seconds']:.0f}", f"{run['steps']}", f"{run['images/s']:.1f}"]
        rows.append((one.contender.name, *cells, f"{run['data wait']:.3f}", f"{run['peak GB']:.2f}"))
    whole = [one.rounds[0] for one in found if not one.problem]
    if len(whole) > 1:
        for name, of in (("mean", mean), ("standard deviation", stdev)):
            rows.append((name, *(f"{of([run[key] for run in whole]):.2f}" for key in SCORES), *("",) * 5))
    rows.append((*PUBLISHED, *("",) * (len(columns) - len(PUBLISHED))))
    return Table("scores on the validation split", columns, tuple(rows))


def curves_table(found: list[Measured]) -> Table:
    """The mean loss of each tenth of the steps."""
    whole = [one for one in found if not one.problem]
    steps = [str(step) for step, _ in whole[0].rounds[0]["losses"]] if whole else []
    rows = tuple((one.contender.name, *(f"{loss:.3f}" for _, loss in one.rounds[0]["losses"])) for one in whole)
    return Table("loss, mean of the steps up to", ("", *steps), rows)


def layers_tables(found: list[Measured], model: ModelConfig) -> list[Table]:
    """Where the gradient was, at looks that lie further and further apart, of the run that looked."""
    seen = [one.rounds[0]["layers"] for one in found if not one.problem and one.rounds[0]["layers"]]
    if not seen:
        return []
    looks = seen[0]
    numbers = sorted({*(2**power for power in range(12)), len(looks)})
    of_layer = parts_of(model)
    rows = []
    for look in (looks[number - 1] for number in numbers if number <= len(looks)):
        squares = dict.fromkeys(PARTS, 0.0)
        for name, values in look["layers"].items():
            squares[of_layer[name.rpartition(".")[0]]] += (values["gradient"]["norm"] or 0.0) ** 2
        whole = sum(squares.values()) or 1.0
        rows.append((f"step {look['step']}", *(f"{100 * square / whole:.2f}" for square in squares.values())))
    return [Table("share of the squared gradient in each part of the network, %", ("", *PARTS), tuple(rows))]


def parts_of(config: ModelConfig) -> dict[str, str]:
    """By layer, the one of `PARTS` it belongs to."""
    with torch.device("meta"):
        model = FCN(1, config)
    stages = [layer for stage in model.stages() for layer in stage]
    numbers = [number for number, stage in enumerate(model.stages()) for _ in stage]
    found = {name: PARTS[numbers[stages.index(layer)]] for name, layer in model.features.named_children()}
    found = {f"features.{name}": part for name, part in found.items()}
    head = {name: PARTS[5 if name.startswith("fc") else 6] for name, _ in model.named_children() if name != "features"}
    return found | head


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
