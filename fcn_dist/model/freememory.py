"""How many bytes a rank may still take, by its device or by its host and the limits set on it."""

import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from fcn_dist.ranks import Rank

UNLIMITED = 1 << 62
CGROUPS = Path("/sys/fs/cgroup")
# Of a control group of version 2 and 1: its limit, what it uses, and the entry of memory.stat that gives way.
CGROUP_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(device: torch.device, rank: Rank) -> int:
    """Bytes of its CUDA device, or its share of what the host and the limits of this process leave."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    shared = min(host_leaves(), *control_groups_leave(Path("/proc/self/cgroup"), CGROUPS))
    return min(shared // rank.local_world_size, process_limits_leave())


def host_leaves() -> int:
    """Bytes that can be taken without swapping."""
    return _entry("/proc/meminfo", "MemAvailable:")


def control_groups_leave(membership: Path, root: Path) -> Iterator[int]:
    """What each control group that this process is in leaves: containers and batch systems set such limits."""
    yield UNLIMITED
    for line in membership.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        version, top = (2, root) if number == "0" else (1, root / "memory")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):  # in a container, parts of the path may not be seen
                yield _group_leaves(folder, *CGROUP_FILES[version])


def _group_leaves(folder: Path, limit_name: str, usage_name: str, cached_name: str) -> int:
    try:
        limit = (folder / limit_name).read_text().strip()
        used = int((folder / usage_name).read_text())
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return UNLIMITED  # the group at the top has no limit
    return UNLIMITED if limit == "max" else max(0, int(limit) - used + int(cached[cached_name]))


def process_limits_leave() -> int:
    """What `ulimit -v` and `ulimit -d` leave."""
    left = UNLIMITED
    for limit, used in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            left = min(left, max(0, most - _entry("/proc/self/status", used)))
    return left


def _entry(table: str, name: str) -> int:
    """One of a table in /proc, in bytes."""
    line = next(line for line in Path(table).read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
