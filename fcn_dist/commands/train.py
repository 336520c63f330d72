"""`deepspeed launch/train.py --shards OUT --output RUN ...`: train, continue, and say what came of it."""

import argparse
from pathlib import Path

from fcn_dist.config import Recipe, load_recipe, recipe_from_dict
from fcn_dist.training.deepspeed_config import read_deepspeed_config
from fcn_dist.training.run import RunConfig, train
from fcn_dist.training.runfolder import read_run_record


def main(argv: list[str]) -> None:
    """Parse and train."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    parser.add_argument("--shards", required=True, help="folder written by shards/create.py, or its URL")
    parser.add_argument("--output", type=Path, required=True, help="run folder, made by this command")
    parser.add_argument("--recipe", type=Path, help="YAML, such as launch/recipes/sceneparsing.yaml")
    parser.add_argument("--deepspeed_config", type=Path, help="JSON, such as launch/zero/zero2_bf16.json")
    parser.add_argument("--steps", type=int, help="steps of the whole run, in place of the recipe's steps or epochs")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, as it began unless told")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a recipe value"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    options = parser.parse_args(argv)
    recipe = _recipe(options)
    deepspeed = read_deepspeed_config(options.deepspeed_config)
    if options.resume and options.deepspeed_config is None:
        deepspeed = read_run_record(options.output).deepspeed
    train(RunConfig(options.shards, options.output, recipe, deepspeed, options.resume))


def _recipe(options: argparse.Namespace) -> Recipe:
    overrides = list(options.overrides)
    if options.steps is not None:
        overrides += [f"schedule.steps={options.steps}", "schedule.epochs=null"]
    if options.resume and options.recipe is None:
        return recipe_from_dict(read_run_record(options.output).recipe, f"{options.output}/run.json", overrides)
    return load_recipe(options.recipe, overrides)
