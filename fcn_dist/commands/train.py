"""`deepspeed launch/train.py --shards OUT --output RUN ...`: train, continue, and say what came of it."""

import argparse
from pathlib import Path

from fcn_dist.commands.ranks import among_ranks
from fcn_dist.config import Recipe
from fcn_dist.recipefile import load_recipe, recipe_from_dict
from fcn_dist.training.deepspeed_config import read_deepspeed_config
from fcn_dist.training.entry import Start
from fcn_dist.training.ready import RunConfig
from fcn_dist.training.run import train
from fcn_dist.training.runfolder import RUN_NAME, read_run_record


def main(argv: list[str]) -> None:
    """Parse, train, and leave the other ranks in order where all come to their end together."""
    config = run_config(argv)
    with among_ranks():
        train(config)


def run_config(argv: list[str]) -> RunConfig:
    """What the command line asks for."""
    options = build_parser().parse_args(argv)
    begun = options.resume or (options.auto_resume and (options.output / RUN_NAME).exists())
    recipe = _recipe(options, begun)
    deepspeed = read_deepspeed_config(options.deepspeed_config)
    if begun and options.deepspeed_config is None:
        deepspeed = read_run_record(options.output).deepspeed
    start_from = Start.RESUME if options.resume else Start.AUTO if options.auto_resume else Start.NEW
    return RunConfig(options.shards, options.output, recipe, deepspeed, start_from)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", required=True, help="folder written by shards/create.py, or its URL")
    parser.add_argument("--output", type=Path, required=True, help="run folder, made by this command")
    parser.add_argument("--recipe", type=Path, help="YAML, or a name of launch/recipes: camvid")
    parser.add_argument("--deepspeed_config", type=Path, help="JSON, or a name of launch/zero: zero2_bf16")
    parser.add_argument("--steps", type=int, help="steps of the whole run, in place of the recipe's steps or epochs")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the run in --output, as it began unless told")
    start.add_argument(
        "--auto-resume", action="store_true", help="continue the run in --output if it has begun, else begin it"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a recipe value"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser


def _recipe(options: argparse.Namespace, begun: bool) -> Recipe:
    overrides = list(options.overrides)
    if options.steps is not None:
        overrides += [f"schedule.steps={options.steps}", "schedule.epochs=null"]
    if begun and options.recipe is None:
        return recipe_from_dict(read_run_record(options.output).recipe, f"{options.output}/run.json", overrides)
    return load_recipe(options.recipe, overrides)
