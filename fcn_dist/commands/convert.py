"""`convert`: a run's checkpoint to one model file."""

import argparse
import json
from pathlib import Path

from fcn_dist.console import console
from fcn_dist.deploy.convert import DTYPES, Conversion, convert
from fcn_dist.errors import named
from fcn_dist.files import write_text


def main(argv: list[str]) -> None:
    """Convert as the arguments say, and print what the new file was compared with."""
    options = _parser().parse_args(argv)
    conversion = convert(options.run, options.out, step=options.step, dtype=options.dtype, overwrite=options.overwrite)
    _print_summary(conversion, options.dtype)
    if options.json:
        write_text(options.json, json.dumps(_as_dict(conversion, options.dtype), indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("convert", description="Turn a run's checkpoint into one model file.")
    add = parser.add_argument
    add("run", type=Path, help="run folder, as launch/train.py wrote it with --output")
    add("out", type=Path, help="model file to write, such as model.safetensors")
    add("--step", type=int, metavar="N", help="checkpoint to convert (default: the newest whole one)")
    add("--dtype", choices=DTYPES, default="float32", help="of the stored weights (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace a model file that is there already")
    add("--json", type=Path, metavar="PATH", help="also write these figures to a JSON file")
    return parser


def _print_summary(conversion: Conversion, dtype: str) -> None:
    state, agreement = conversion.checkpoint.state, conversion.agreement
    for damage in conversion.passed_over:
        console.print(f"passed over {damage.dir}: {damage.reason}")
    console.print(
        f"checkpoint  {conversion.checkpoint.dir} (step {state.step}, ZeRO stage {state.zero_stage}, "
        f"{state.world_size} ranks, {state.precision})"
    )
    if conversion.rounded:
        console.print(
            f"note        DeepSpeed kept {len(conversion.rounded)} parameters in 16 bits only, so float32 gains them "
            f"nothing: {named(list(conversion.rounded))}"
        )
    console.print(
        f"checked     {agreement.scores:,} scores of the probe image against the training engine's, in "
        f"{agreement.arithmetic}: largest difference {agreement.difference:.2g} of the largest score, "
        f"{agreement.tolerance:.2g} allowed"
    )
    console.print(
        f"wrote       {conversion.path} ({conversion.parameters:,} weights in {dtype}, "
        f"{conversion.path.stat().st_size / 1e6:,.1f} MB)"
    )


def _as_dict(conversion: Conversion, dtype: str) -> dict[str, object]:
    agreement = conversion.agreement
    return {
        "model": str(conversion.path),
        "checkpoint": str(conversion.checkpoint.dir),
        "step": conversion.checkpoint.state.step,
        "passed_over": {str(damage.dir): damage.reason for damage in conversion.passed_over},
        "kept_in_16_bits": list(conversion.rounded),
        "parameters": conversion.parameters,
        "dtype": dtype,
        "arithmetic": agreement.arithmetic,
        "difference": agreement.difference,
        "tolerance": agreement.tolerance,
    }
