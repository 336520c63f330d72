"""A DeepSpeed hostfile in, checked hosts out. Host names reach ssh and pdsh, which run shells."""

import re
from dataclasses import dataclass
from pathlib import Path

from fcn_dist.errors import UserError

# RFC 1123's letters, digits, '-' and '.', and the '_' that some sites use. A '-' in front would be an option to ssh;
# '@', ':', ',', '[' and '^' have meanings of their own to pdsh.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", re.ASCII)
_SLOTS = re.compile(r"slots=([1-9][0-9]{0,3})", re.ASCII)
_FORM = "a line is NAME slots=N, such as worker-0 slots=8"


@dataclass(frozen=True)
class Host:
    """A host and how many ranks it takes."""

    name: str
    slots: int


def check_host_name(name: str, where: str) -> None:
    """Raise UserError unless `name` is a plain host name or IPv4 address; `where` says who gave it."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{where}: {name!r} is no host name; letters, digits, '-', '_' and '.' are needed, a letter or digit first "
            "and last; users and ports belong into ~/.ssh/config, under a name for the host"
        )


def read_hostfile(path: Path) -> list[Host]:
    """The hosts in their order, which is that of the ranks; raises UserError naming the line that is wrong."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"hostfile {path} cannot be read ({error}); {_FORM}") from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = _SLOTS.fullmatch(words[1]) if len(words) == 2 else None
        if not slots:
            raise UserError(f"{where}: {line.strip()!r} is no host with slots; {_FORM}")
        check_host_name(words[0], where)
        if words[0].lower() in hosts:
            raise UserError(f"{where}: {words[0]} is named twice; one line for each host is needed; add up its slots")
        hosts[words[0].lower()] = Host(words[0], int(slots[1]))
    if not hosts:
        raise UserError(f"hostfile {path} names no host; {_FORM}")
    return list(hosts.values())


def write_hostfile(path: Path, hosts: list[Host]) -> None:
    """Write what was checked, for DeepSpeed to read nothing else."""
    path.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts))
