"""`download`: fetch the benchmark's scenes, or another zipped scenes folder."""

import argparse

from rich.table import Table

from fcn_dist.console import console
from fcn_dist.data.download.extract import DEFAULT_MAX_SIZE
from fcn_dist.data.download.run import ALGORITHMS, DEFAULT_CHECKSUM, DEFAULT_URL, SceneCounts, download
from fcn_dist.sizes import parse_size, show_size


def main(argv: list[str]) -> None:
    """Download as the arguments say, and print what is there."""
    options = vars(build_parser().parse_args(argv))
    out, checksum, size = options.pop("out"), options.pop("hash"), options.pop("size")
    options["max_size"] = parse_size(options["max_size"])
    counts = download(out, checksum=checksum, size=None if size is None else parse_size(size), **options)
    _print_counts(counts, out)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Fetch a zipped scenes folder, check it, and unpack it. A download that ends early goes on from "
        "there when it is started again; one that is done is left as it is.",
    )
    add = parser.add_argument
    add("out", help="folder to become the scenes folder; it must be new or empty")
    add("--url", default=DEFAULT_URL, help="of the zip, http or https (default: %(default)s)")
    add(
        "--hash",
        metavar="ALGORITHM:HEX",
        help=f"of the zip, by {', '.join(ALGORITHMS)} (default: for the default address {DEFAULT_CHECKSUM})",
    )
    add("--size", metavar="BYTES", help="of the zip, to the byte (default: what the server says)")
    add(
        "--max-size",
        default=show_size(DEFAULT_MAX_SIZE),
        metavar="SIZE",
        help="of the zip, and of all that is unpacked (default: %(default)s)",
    )
    add("--keep-zip", action="store_true", help="leave the zip at OUT.zip")
    return parser


def _print_counts(counts: SceneCounts, out: str) -> None:
    table = Table("split", "pairs", title="scenes", title_justify="left")
    table.columns[1].justify = "right"
    for split, pairs in counts.pairs.items():
        table.add_row(split, f"{pairs:,}")
    console.print(table)
    state = "downloaded, and every file has its partner" if counts.downloaded else "was there already, and is whole"
    console.print(f"{out}: {counts.classes} classes; {state}")
