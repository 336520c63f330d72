"""`fcn-dist train [--ranks N] [--hostfile FILE] ...`: all ranks of a training, started and watched by this process.

It is itself the rank where there is only one device, and where a launcher has started it. The other options are those
of launch/train.py.
"""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from fcn_dist.errors import UserError
from fcn_dist.launching.hostfile import check_host_name, read_hostfile
from fcn_dist.launching.supervise import Launch, supervise


def main(argv: list[str]) -> None:
    """Be the rank, or exit with the code of the job."""
    options, rest = build_parser().parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        build_parser().print_help()
        print()
    given = [f"--{name}" for name in ("ranks", "hostfile") if getattr(options, name) is not None]
    if "RANK" in os.environ and given:
        raise UserError(f"{' and '.join(given)} start ranks, and a launcher has started this one already; leave it out")
    if options.hostfile is None and options.ranks is None and ("RANK" in os.environ or _devices() <= 1):
        import_module("fcn_dist.commands.train").main(rest)
        return
    sys.exit(supervise(_launch(options, rest)))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="fcn-dist train", description=__doc__, add_help=False, allow_abbrev=False, usage="%(prog)s [options]"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks on this host; all CUDA devices unless given")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="hosts to train on: lines of NAME slots=RANKS")
    parser.add_argument("--master_addr", metavar="ADDRESS", help="of the first host, where its first does not serve")
    parser.add_argument("--master_port", type=int, metavar="PORT", help="on the first host; a free one unless given")
    parser.add_argument("--enable_each_rank_log", type=Path, metavar="FOLDER", help="a file per rank, not the console")
    parser.add_argument(
        "--grace", type=float, default=20.0, metavar="SECONDS", help="for saving, once a launcher or a rank is lost"
    )
    parser.add_argument(
        "--host_timeout", type=float, default=60.0, metavar="SECONDS", help="without a word until a host counts as lost"
    )
    return parser


def _launch(options: argparse.Namespace, rest: list[str]) -> Launch:
    devices = _devices()
    ranks = options.ranks or devices
    if options.hostfile is not None and options.ranks is not None:
        raise UserError("--ranks and --hostfile both say how many ranks there are; leave --ranks out")
    if ranks < 1 and options.hostfile is None:
        raise UserError(f"--ranks is {options.ranks}; at least 1 is needed")
    if devices and ranks > devices and options.hostfile is None:
        raise UserError(f"--ranks is {ranks}, and {devices} CUDA devices are visible; a device for each is needed")
    if options.master_addr is not None:
        check_host_name(options.master_addr, "--master_addr")
    return Launch(
        arguments=["-m", "fcn_dist", "train", *rest],
        ranks=ranks,
        hosts=None if options.hostfile is None else read_hostfile(options.hostfile),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES", "") if devices else "",
        master_addr=options.master_addr,
        master_port=options.master_port,
        log_dir=options.enable_each_rank_log,
        grace=options.grace,
        host_timeout=options.host_timeout,
    )


def _devices() -> int:
    """CUDA devices that are visible to this process."""
    import torch

    return torch.cuda.device_count()
