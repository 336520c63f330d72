"""`convert`: a run's checkpoint, or another system's weights, to one model file."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fcn_dist.checkpoints.consolidate import WEIGHTS
from fcn_dist.commands.anywhere import parse_anywhere
from fcn_dist.commands.termination import unwound_by_sigterm
from fcn_dist.console import console
from fcn_dist.data.scenes.class_info import read_names
from fcn_dist.deploy import pytorch_fcn
from fcn_dist.deploy.card import card_lines
from fcn_dist.deploy.convert import DTYPES, Conversion, convert
from fcn_dist.deploy.export import SIZES, export
from fcn_dist.deploy.modelfile import GRAPHS, check_new, read_model_file
from fcn_dist.deploy.modelurl import local_copy
from fcn_dist.deploy.pictures import short_name
from fcn_dist.deploy.proof import Agreement
from fcn_dist.errors import UserError, counted, named
from fcn_dist.files import write_text

SUFFIXES = {".safetensors": "safetensors", **GRAPHS}  # of what can be written
# What a file says of its source, as people call it.
SHOWN = {
    "weights": "which",
    "precision": "trained in",
    "zero_stage": "ZeRO stage",
    "world_size": "ranks",
    "index_sha256": "index",
    "kept_in_16_bits": "in 16 bits only",
}


@unwound_by_sigterm()
def main(argv: list[str]) -> None:
    """Convert as the arguments say, and print what the new file was compared with."""
    parser = build_parser()
    options = parse_anywhere(parser, argv)
    if options.show:
        _show(options.run)
        return
    if options.out is None:
        parser.error("a file to write is needed, such as model.safetensors")
    form = _form(options)
    if options.json:
        check_new(options.json, options.overwrite, Path(options.run))
        if options.json.resolve() == options.out.resolve():
            raise UserError(f"{options.out} is to be the model file, and --json names it too; choose another --json")
    if options.origin:
        _convert_weights(options, form)
        return
    if options.classes or options.at_once:
        raise UserError(
            "--classes and --at-once describe weights given with --from; a run knows its own; leave them out"
        )
    if form != "safetensors":
        _export(options, form)
        return
    conversion = convert(
        options.run,
        options.out,
        step=options.step,
        weights=options.weights,
        dtype=options.dtype,
        overwrite=options.overwrite,
    )
    _print_summary(conversion, options.dtype)
    if options.json:
        write_text(options.json, json.dumps(_as_dict(conversion, options.dtype), indent=1) + "\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Turn a run's checkpoint into one model file.")
    add = parser.add_argument
    add(
        "run",
        help="run folder, as launch/train.py wrote it; or a step's universal checkpoint; with --from, a file",
    )
    add("out", type=Path, nargs="?", help="model file to write, such as model.safetensors")
    add("--step", type=int, metavar="N", help="checkpoint to convert (default: the newest whole one)")
    add("--weights", choices=WEIGHTS, help="which (default: averaged where there are any, see train.ema)")
    add("--dtype", choices=DTYPES, default="float32", help="of the stored weights (default: %(default)s)")
    add("--show", action="store_true", help="print what a model file, given in place of a run, says of itself")
    add(
        "--to", choices=SUFFIXES.values(), help="what to write (default: as the file's name ends, or else a model file)"
    )
    add("--overwrite", action="store_true", help="replace a model file that is there already")
    add("--from", dest="origin", choices=("pytorch-fcn",), help="convert a .pth state dict of that system")
    add("--classes", type=Path, metavar="FILE", help="its classes: objectInfo150.txt, or a name a line")
    add("--at-once", action="store_true", help="it is the at-once form, FCN8sAtOnce")
    add("--json", type=Path, metavar="PATH", help="also write these figures to a JSON file")
    return parser


def _form(options: argparse.Namespace) -> str:
    """What is to be written."""
    by_name = SUFFIXES.get(options.out.suffix)
    if options.to and by_name and options.to != by_name:
        raise UserError(
            f"{options.out} ends as a file of --to {by_name} does, and --to {options.to} is given; rename it, or leave "
            "--to out"
        )
    return str(options.to or by_name or "safetensors")


def _show(location: str) -> None:
    """What a model file says."""
    path = local_copy(location)
    model, info = read_model_file(path)
    description, config = info.description, info.description.config
    table = Table(show_header=False, box=None)
    form = f"{config.variant} on {config.backbone}, geometry {config.geometry}{', at once' if config.at_once else ''}"
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    rows = [
        ("network", form),
        ("weights", f"{numbers:,} in {info.dtype}, {path.stat().st_size / 1e6:,.1f} MB"),
        (
            "pixels",
            f"{description.preprocessing.channel_order}, minus {_rounded(description.preprocessing.mean)}, "
            f"over {_rounded(description.preprocessing.std)}",
        ),
        ("classes", ", ".join(short_name(name) for name in description.classes)),
        ("outputs", f"{model.num_outputs}: labels {0 if description.score_other else 1} to {len(description.classes)}"),
        *_card(info.source),
        *(
            (SHOWN.get(key, key), str(value))
            for key, value in info.source.items()
            if key not in ("card", "scores", "dtype") and value != []
        ),
    ]
    table.add_column()
    table.add_column(overflow="fold")  # hashes whole
    for name, text in rows:
        table.add_row(name, text)
    console.print(table)


def _card(source: dict[str, Any]) -> list[tuple[str, str]]:
    try:
        return card_lines(source["card"]) if "card" in source else []
    except (KeyError, TypeError, ValueError, AttributeError):
        return [("card", "cannot be read")]


def _rounded(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _export(options: argparse.Namespace, form: str) -> None:
    """A graph for another runtime."""
    if options.dtype != "float32":
        raise UserError(f"--dtype {options.dtype} is of model files; --to {form} writes float32; leave it out")
    exported = export(
        options.run, options.out, form, step=options.step, weights=options.weights, overwrite=options.overwrite
    )
    conversion, network = exported.conversion, exported.network
    _print_checkpoint(conversion)
    _print_agreement(exported.probe)
    console.print(
        f"            {network.scores:,} scores and {exported.labels:,} labels of images of {len(SIZES)} sizes against "
        f"the network's own: largest difference {network.difference:.2g}, {network.tolerance:.2g} allowed"
    )
    _print_file(exported.path, conversion.parameters, "float32")
    if options.json:
        figures = _as_dict(conversion, "float32") | {
            "model": str(exported.path),
            "form": exported.form,
            "difference": exported.probe.difference,
            "tolerance": exported.probe.tolerance,
            "network_difference": network.difference,
            "network_tolerance": network.tolerance,
        }
        write_text(options.json, json.dumps(figures, indent=1) + "\n")


def _convert_weights(options: argparse.Namespace, form: str) -> None:
    """Those of pytorch-fcn."""
    if not options.classes:
        raise UserError("a state dict does not name its classes; --classes with a file of names is needed")
    for name in ("step", "weights", "json"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is about a run; --from {options.origin} takes a file; leave it out")
    if form != "safetensors":
        raise UserError(f"--to {form} is about a run; --from {options.origin} writes model files; leave it out")
    converted = pytorch_fcn.convert(
        Path(options.run),
        options.out,
        read_names(options.classes),
        at_once=options.at_once,
        dtype=options.dtype,
        overwrite=options.overwrite,
    )
    model = converted.description.config
    console.print(
        f"read        {options.run}: {model.variant}{' at once' if model.at_once else ''} of pytorch-fcn, "
        f"{len(converted.description.classes)} classes"
    )
    console.print(
        f"checked     {converted.scores:,} scores of a probe image against its own layers: largest difference "
        f"{converted.difference:.2g} of the largest score, {converted.tolerance:.2g} allowed"
    )
    _print_file(converted.path, converted.parameters, options.dtype)


def _print_file(path: Path, parameters: int, dtype: str) -> None:
    console.print(f"wrote       {path} ({parameters:,} weights in {dtype}, {path.stat().st_size / 1e6:,.1f} MB)")


def _print_summary(conversion: Conversion, dtype: str) -> None:
    _print_checkpoint(conversion)
    _print_agreement(conversion.agreement)
    _print_file(conversion.path, conversion.parameters, dtype)


def _print_checkpoint(conversion: Conversion) -> None:
    state = conversion.checkpoint.state
    for damage in conversion.passed_over:
        console.print(f"passed over {damage.dir}: {damage.reason}")
    console.print(
        f"checkpoint  {conversion.checkpoint.dir} (step {state.step}, ZeRO stage {state.zero_stage}, "
        f"{counted(state.world_size, 'rank')}, {state.precision}), its {conversion.weights} weights"
    )
    if conversion.rounded:
        console.print(
            f"note        DeepSpeed kept {len(conversion.rounded)} parameters in 16 bits only, so float32 gains them "
            f"nothing: {named(list(conversion.rounded))}"
        )
    if conversion.left_out:
        console.print(f"left out    {named(list(conversion.left_out))}, which are in training alone")


def _print_agreement(agreement: Agreement) -> None:
    console.print(
        f"checked     {agreement.scores:,} scores of the probe image against the training engine's, in "
        f"{agreement.arithmetic}: largest difference {agreement.difference:.2g} of the largest score, "
        f"{agreement.tolerance:.2g} allowed"
    )


def _as_dict(conversion: Conversion, dtype: str) -> dict[str, object]:
    agreement = conversion.agreement
    return {
        "model": str(conversion.path),
        "checkpoint": str(conversion.checkpoint.dir),
        "step": conversion.checkpoint.state.step,
        "weights": conversion.weights,
        "passed_over": {str(damage.dir): damage.reason for damage in conversion.passed_over},
        "kept_in_16_bits": list(conversion.rounded),
        "left_out": list(conversion.left_out),
        "parameters": conversion.parameters,
        "dtype": dtype,
        "arithmetic": agreement.arithmetic,
        "difference": agreement.difference,
        "tolerance": agreement.tolerance,
    }
