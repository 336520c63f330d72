"""`serve`: a model file on a local page, where images are dropped and masks are seen, and for scripts over HTTP."""

import argparse

from fcn_dist.commands.views import add_views, views_of
from fcn_dist.deploy.predict import AUTO, PRECISIONS, Predictor
from fcn_dist.sizes import parse_size


def main(argv: list[str]) -> None:
    """Listen first, so that a taken port is told before the model is read; then serve until a signal."""
    options = build_parser().parse_args(argv)
    # These need the extra, which --help does not.
    from fcn_dist.serving.limits import Limits
    from fcn_dist.serving.server import listen, serve

    limits = Limits(parse_size(options.max_bytes), options.max_pixels, options.requests)
    with listen(options.host, options.port) as listener:
        predictor = Predictor.from_file(options.model, options.device, options.precision, views_of(options))
        serve(predictor, listener, limits)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Label images on a local page, or for scripts over HTTP.")
    add = parser.add_argument
    add("model", help="model file, as launch/convert.py wrote it, a folder with one, or its address with #sha256=...")
    add(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0 opens it to the network (default: this machine)"
    )
    add("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--precision", choices=PRECISIONS, default=AUTO, help="default: bfloat16 where the device multiplies it")
    add("--max-bytes", default="32MB", metavar="SIZE", help="of an upload (default: 32MB)")
    add("--max-pixels", type=int, default=16_000_000, metavar="N", help="of an image (default: 16,000,000)")
    add("--requests", type=int, default=16, metavar="N", help="let in at once, to wait for their turn (default: 16)")
    add_views(parser)
    return parser
