"""FCN-8s on CamVid from ImageNet's VGG16 convolutions: scores over seeds, time, memory, curves, and what learns when.

    python benchmarks/camvid.py CAMVID --weights vgg16_conv_caffe.safetensors --output reports

CAMVID is a folder of scenes or of shards. The recipe is camvid.yaml on one GPU, and camvid_cpu.yaml where there is
none. Prints tables, and writes them as Markdown with every figure as JSON, and a page about each training.
"""

import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev

import torch
from entry import run_benchmark
from measure import Measured
from tables import Table, one_line, write_report
from training_run import RECIPES, Training, check_weights, device, end, measured, options, shards_of

from fcn_dist.config import ModelConfig
from fcn_dist.data.shardset import ShardSet
from fcn_dist.model.fcn import FCN, HEAD_CHANNELS, scaled
from fcn_dist.recipefile import load_recipe
from fcn_dist.training.schedule import total_steps

LOOKS = 250  # at the layers, of the first seed, so that the first of them is an early one
PARTS = ("stage 1", "stage 2", "stage 3", "stage 4", "stage 5", "fc6 and fc7", "score layers")
SCORES = ("mean IoU", "pixel accuracy", "mean accuracy")
# Published for FCN-8s with ImageNet's VGG16 on CamVid's test split, which is another one.
PUBLISHED = ("published, test split", "57.0", "88.0")


def main(argv: list[str]) -> None:
    """Train and report."""
    parser = options(__doc__)
    add = parser.add_argument
    add("--recipe", type=Path, metavar="FILE", help="default: camvid.yaml on a GPU, camvid_cpu.yaml without")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    args = parser.parse_args(argv)
    check_weights(args.weights)
    name, kind = device()
    recipe = args.recipe or RECIPES / ("camvid.yaml" if kind == "cuda" else "camvid_cpu.yaml")
    settings = [f"model.weights={args.weights.resolve()}", *args.settings]
    with tempfile.TemporaryDirectory() as scratch:
        shards = shards_of(args.camvid, Path(scratch), short_side=None)
        rows = trainings(recipe, settings, args.seeds, shards, pages_dir(args.output))
        found = measured(rows, shards, Path(scratch))
    model = load_recipe(recipe, settings).model
    facts = {
        "device": name,
        "recipe": recipe.name,
        "network": f"{model.variant} on {model.backbone}, {head_channels(model)} channels in fc6 and fc7",
    }
    tables = [scores_table(found), curves_table(found), *gradient_tables(found, model)]
    write_report(args.output, f"camvid-{kind}", facts, tables, found)
    end(rows, found)


def pages_dir(output: Path) -> Path:
    """`output`, made. Raises UserError where pages cannot be drawn: before hours of training, not after."""
    import_module("fcn_dist.reporting.charts")
    output.mkdir(parents=True, exist_ok=True)
    return output


def trainings(recipe: Path, settings: list[str], seeds: list[int], shards: Path, pages: Path) -> list[Training]:
    """One a seed, with a page each; the first looks at its layers."""
    read = load_recipe(recipe, settings)
    samples = len(ShardSet.open(str(shards), "training"))
    steps = total_steps(read.schedule, samples, read.train.global_batch or 1)
    looks = [f"log.layers={max(1, steps // LOOKS)}"]
    return [
        Training(
            f"seed {seed}",
            recipe,
            (*settings, f"train.seed={seed}", *(looks if number == 0 else [])),
            page=pages / f"camvid-seed-{seed}.html",
        )
        for number, seed in enumerate(seeds)
    ]


def head_channels(config: ModelConfig) -> int:
    """Of fc6 and fc7."""
    return config.head_width or scaled(HEAD_CHANNELS, config.width)


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


def gradient_tables(found: list[Measured], config: ModelConfig) -> list[Table]:
    """Where the gradient was, at looks that lie further and further apart, of the run that looked."""
    looked = [run["gradients"] for one in found for run in one.rounds if run["gradients"]]
    if not looked:
        return []
    looks = looked[0]
    stage_of = stages_of(config)
    rows = []
    for step, norms in (looks[number] for number in spread(len(looks))):
        squares = dict.fromkeys(PARTS, 0.0)
        for name, norm in norms.items():
            squares[part_of(name.rpartition(".")[0], stage_of)] += norm**2
        whole = sum(squares.values()) or 1.0
        rows.append((f"step {step}", *(f"{100 * square / whole:.2f}" for square in squares.values())))
    return [Table("share of the squared gradient in each part of the network, %", ("", *PARTS), tuple(rows))]


def spread(count: int) -> list[int]:
    """Of so many, the first, second, fourth and so on, and the last: their numbers from 0."""
    return sorted({2**power - 1 for power in range(count.bit_length())} | {count - 1})


def part_of(layer: str, stage_of: Mapping[str, int]) -> str:
    """The one of `PARTS` that a layer belongs to; auxiliary heads are score layers."""
    if layer in stage_of:
        return PARTS[stage_of[layer] - 1]
    return PARTS[5] if layer in ("fc6", "fc7") else PARTS[6]


def stages_of(config: ModelConfig) -> dict[str, int]:
    """The stage of each layer of the trunk, by its name."""
    with torch.device("meta"):
        model = FCN(1, config)
    numbers = [number for number, stage in enumerate(model.stages(), 1) for _ in stage]
    return {f"features.{layer}": number for layer, number in enumerate(numbers)}


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
