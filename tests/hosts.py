"""Hosts on one machine: namespaces of processes, mounts and network, an sshd in each, and a bridge between them.

All of it lives by processes that die with the test's; no name of it is left in the system.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("unshare", "nsenter", "setpriv", "ip", "sshd", "ssh-keygen", "pdsh", "hostname")
SETTING_UP = 30.0  # seconds


@dataclass(frozen=True)
class Host:
    """A host of a cluster."""

    name: str
    address: str
    pid: int  # of its first process, as seen from outside
    link: str  # its end of the cable, in the hub

    def processes(self) -> list[psutil.Process]:
        """All that runs on it but sshd."""
        own = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                here = Path(f"/proc/{process.pid}/ns/pid").readlink() == own
                if here and process.name() != "sshd" and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


@dataclass(frozen=True)
class Cluster:
    """Hosts h1, h2, ... and the folder on their shared disk."""

    hosts: list[Host]
    folder: Path
    hub: int  # the process that holds the bridge

    def command(self, host: Host, arguments: Sequence[str]) -> list[str]:
        """What runs `arguments` on a host, in the folder that the caller is in."""
        return ["nsenter", "--all", "--target", str(host.pid), f"--wd={Path.cwd()}", "--", *arguments]

    def environment(self) -> dict[str, str]:
        """With the cluster's ssh."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}

    def cut(self, host: Host) -> None:
        """Pull the cable of a host."""
        sh("nsenter", "--net", f"--target={self.hub}", "ip", "link", "set", host.link, "down")

    def hostfile(self, hosts: int, slots: int) -> Path:
        """A hostfile of the first `hosts`."""
        path = self.folder / f"hostfile-{hosts}-{slots}"
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self.hosts[:hosts]))
        return path


def sh(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=SETTING_UP, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def need_hosts() -> None:
    """Skip the test where hosts cannot be made, with the reason."""
    if os.geteuid():
        pytest.skip("namespaces of hosts need root")
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in NEEDED if not shutil.which(name, path=path)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; run tests/cluster/packages.sh")
    tried = subprocess.run(["unshare", "--net", "--pid", "--uts", "--mount", "--fork", "true"], capture_output=True)
    if tried.returncode:
        pytest.skip(f"this machine makes no namespaces: {tried.stderr.decode().strip()}")


@contextmanager
def cluster(folder: Path, count: int) -> Iterator[Cluster]:
    """`count` hosts that share `folder`; gone after the block with all that runs on them."""
    need_hosts()
    names = [f"h{number}" for number in range(1, count + 1)]
    addresses = [f"10.77.0.{number}" for number in range(1, count + 1)]
    write_ssh(folder, names)
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(addresses, names, strict=True))
    )
    with ExitStack() as stack:
        hub = stack.enter_context(first_process("--net", "sleep", "infinity"))
        in_hub = ("nsenter", "--net", f"--target={hub}", "ip", "link")
        sh(*in_hub, "add", "bridge", "type", "bridge")
        sh(*in_hub, "set", "bridge", "up")
        hosts = []
        for name, address in zip(names, addresses, strict=True):
            init = ("sh", str(ROOT / "tests" / "cluster" / "host.sh"), name, str(folder))
            pid = stack.enter_context(
                first_process("--net", "--pid", "--uts", "--ipc", "--mount", "--mount-proc", *init)
            )
            link = f"to-{name}"
            sh(*in_hub, "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
            sh(*in_hub, "set", link, "master", "bridge", "up")
            for command in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                sh("nsenter", "--net", f"--target={pid}", "ip", *command.split())
            hosts.append(Host(name, address, pid, link))
        made = Cluster(hosts, folder, hub)
        for host in hosts:
            until(lambda host=host: answers(made, host), f"an answer from {host.name}")  # type: ignore[misc]
        yield made


def answers(made: Cluster, host: Host) -> bool:
    ssh = made.command(made.hosts[0], [str(made.folder / "bin" / "ssh"), host.name, "true"])
    return subprocess.run(ssh, capture_output=True, timeout=SETTING_UP, check=False).returncode == 0


@contextmanager
def first_process(*arguments: str) -> Iterator[int]:
    """The process that `unshare --fork` starts with these options and command; it dies with the test's process."""
    unshare = ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child=KILL", *arguments]
    holder = subprocess.Popen(unshare, stdin=subprocess.DEVNULL)
    try:
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        until(lambda: holder.poll() is not None or children.read_text().strip(), f"a child of {' '.join(unshare)}")
        yield int(children.read_text().split()[0])
    finally:
        holder.kill()
        holder.wait()


def write_ssh(folder: Path, names: list[str]) -> None:
    """Keys, and configurations of sshd and ssh, that have nothing to do with those of the machine."""
    for key in ("host_key", "user_key"):
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{name} {host_key}" for name in names))
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nPermitRootLogin yes\nStrictModes no\n"
        "UsePAM no\nPidFile none\nPasswordAuthentication no\nMaxStartups 100\n"
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/user_key\nUserKnownHostsFile {folder}/known_hosts\nStrictHostKeyChecking yes\n"
    )
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)


def until(condition: Callable[[], object], what: str, limit: float = SETTING_UP) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"not in {limit:g} s: {what}"
        time.sleep(0.05)


def fcn_dist(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fcn_dist", *arguments]
