"""Hostfiles, export files and orders: what is let through to other hosts' shells, and what is refused by name."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcn_dist.errors import UserError
from fcn_dist.launching.exports import FILE_NAME, of_families, read_export_files
from fcn_dist.launching.hostfile import Host, read_hostfile, write_hostfile
from fcn_dist.launching.runner import check_plain, hosts_environment, local_command
from fcn_dist.launching.start import Order

ROOT = Path(__file__).resolve().parents[1]


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_hosts_are_read_in_their_order_and_written_back(tmp_path: Path) -> None:
    text = "# ours\n\nworker-1 slots=8\n  10.0.0.2\tslots=4  # the small one\nnode_3.example.org slots=16\n"
    hosts = [Host("worker-1", 8), Host("10.0.0.2", 4), Host("node_3.example.org", 16)]
    assert read_hostfile(hostfile(tmp_path, text)) == hosts
    write_hostfile(tmp_path / "again", hosts)
    assert read_hostfile(tmp_path / "again") == hosts
    assert read_hostfile(ROOT / "launch" / "hostfile.example") == [Host("worker-0", 8), Host("worker-1", 8)]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "-oProxyCommand=x",
            "a;touch",
            "$(id)",
            "`id`",
            "a|b",
            "a&b",
            "root@a",
            "a:22",
            "a,b",
            "a[1-3]",
            "^file",
            "a/b",
        ),
        *("ä", "a'", 'a"', "a\\", "a-", ".a", "a%n", "a" * 254, "*", "~a", "!a", "a\u200b"),
    ],
)
def test_a_name_that_ssh_or_a_shell_would_take_for_more_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"hostfile line 2: {re.escape(repr(name))} is no host name"):
        read_hostfile(hostfile(tmp_path, f"a slots=1\n{name} slots=1\n"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a", "no host with slots"),
        ("a slots=0", "no host with slots"),
        ("a slots=-1", "no host with slots"),
        ("a slots=99999", "no host with slots"),
        ("a slots=²", "no host with slots"),
        ("a slots=1 b slots=1", "no host with slots"),
        ("a slots=1;id", "no host with slots"),
        ("W0 slots=1", "named twice"),
    ],
)
def test_a_line_that_is_no_host_is_named(line: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"hostfile line 2: .*{reason}"):
        read_hostfile(hostfile(tmp_path, f"w0 slots=1\n{line}\n"))


def test_a_hostfile_without_hosts_or_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no host"):
        read_hostfile(hostfile(tmp_path, "# none\n"))
    with pytest.raises(UserError, match="cannot be read"):
        read_hostfile(tmp_path / "nowhere")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        read_hostfile(tmp_path / "bytes")


@given(st.lists(st.text(st.characters(exclude_characters="\0"))), st.text())
def test_an_order_says_anything_in_characters_that_no_shell_acts_on(arguments: list[str], folder: str) -> None:
    order = Order(arguments, folder, {"NAME": folder})
    text = order.encode()
    assert re.fullmatch(r"[A-Za-z0-9_=-]+", text)
    assert Order.decode(text) == order


def test_an_order_is_carried_out_by_the_same_process_in_the_folder_it_names(tmp_path: Path) -> None:
    folder = tmp_path / "a b;$(id)"
    folder.mkdir()
    code = "import json, os, sys; print(json.dumps([os.getpid(), os.getcwd(), sys.argv[1:], os.environ['X']]))"
    order = Order(["-c", code, "x y", "$(id)", "'\""], str(folder), {"X": "`id`"}, log_dir=str(tmp_path / "logs"))
    started = subprocess.Popen(
        [sys.executable, "-m", "fcn_dist.launching.start", order.encode()], env={**os.environ, "RANK": "3"}
    )
    assert started.wait(60) == 0
    log = (tmp_path / "logs" / "rank-3.log").read_text()
    assert json.loads(log) == [started.pid, str(folder), ["x y", "$(id)", "'\""], "`id`"]


def test_a_folder_that_a_host_does_not_have_ends_in_2_and_is_named(tmp_path: Path) -> None:
    order = Order(["-c", "pass"], str(tmp_path / "nowhere"), {})
    command = [sys.executable, "-m", "fcn_dist.launching.start", order.encode()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and f"{tmp_path / 'nowhere'} cannot be used" in done.stderr


def test_export_files_are_read_one_over_the_other(tmp_path: Path) -> None:
    for name, text in (("home", "A=1\nB=x y\n\n"), ("here", " A = $(id) = 2 \n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE_NAME).write_text(text)
    assert read_export_files([tmp_path / "home", tmp_path / "here", tmp_path]) == {"A": "$(id) = 2", "B": "x y"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("LD_PRELOAD=/tmp/x.so", "LD_PRELOAD is not taken"),
        ("PYTHONPATH=/tmp", "PYTHONPATH is not taken"),
        ("RANK=0", "RANK is not taken"),
        ("FCN_DIST_JOB=/tmp", "FCN_DIST_JOB is not taken"),
        ("A;id=1", "is no NAME=VALUE"),
        ("export A", "is no NAME=VALUE"),
    ],
)
def test_a_surprising_export_is_refused_with_its_line(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(f"A=1\n{text}\n")
    with pytest.raises(UserError, match=f"line 2: .*{reason}"):
        read_export_files([tmp_path])


def test_an_export_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("A=1\n")
    (tmp_path / FILE_NAME).chmod(0o666)
    with pytest.raises(UserError, match="others than you may write it"):
        read_export_files([tmp_path])


def test_only_the_variables_of_communication_go_along() -> None:
    variables = {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "HOME": "/root", "PYTHONPATH": "x", "AWS_KEY": "y"}
    assert of_families(variables) == {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0"}


def test_deepspeed_is_given_nothing_to_export_that_a_shell_would_act_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "$(id)")
    monkeypatch.setenv("PYTHONWARNINGS", "`id`")
    environment = hosts_environment(Path("/tmp/fcn-dist-0"), tmp_path)
    assert "NCCL_DEBUG" not in environment and "PYTHONWARNINGS" not in environment
    assert (tmp_path / "environment").read_text() == "FCN_DIST_JOB=/tmp/fcn-dist-0\n"
    monkeypatch.setenv("PYTHONPATH", "/a b")
    with pytest.raises(UserError, match=r"PYTHONPATH is '.*/a b', which a shell"):
        hosts_environment(Path("/tmp/fcn-dist-0"), tmp_path)
    for text in ("a b", "$HOME", "a;b", "%n", "~", "a\n", "ä"):
        with pytest.raises(UserError):
            check_plain(text, "it")


def test_the_visible_devices_are_those_that_ranks_are_started_on() -> None:
    assert "--num_gpus=2" in local_command(2, "", 1, "order")
    assert "--include=localhost:2,5" in local_command(2, "2, 5,7", 1, "order")
    with pytest.raises(UserError, match="device numbers"):
        local_command(1, "GPU-8932f937", 1, "order")
