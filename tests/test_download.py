"""Whatever a server does: a whole scenes folder at the end, or one message and nothing that looks whole."""

import errno
import fcntl
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
from conftest import MakeScenes
from loopback import Site, file, status

from fcn_dist.commands.entry import run_script
from fcn_dist.data import diskspace
from fcn_dist.data.download.run import DEFAULT_CHECKSUM, DEFAULT_URL, check_scenes, download
from fcn_dist.errors import UserError

pytestmark = pytest.mark.timeout(60)
SCRIPT = Path(__file__).resolve().parents[1] / "shards" / "download.py"
TOP = "ADEChallengeData2016"


@pytest.fixture
def scenes(make_scenes: MakeScenes) -> Path:
    return make_scenes(n=3)


@pytest.fixture
def data(scenes: Path) -> bytes:
    return zipped(scenes)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "down" / "ade"


def zipped(scenes: Path, top: str = f"{TOP}/") -> bytes:
    memory = io.BytesIO()
    with ZipFile(memory, "w") as archive:
        for path in sorted(scenes.rglob("*")):
            archive.write(path, top + path.relative_to(scenes).as_posix())
    return memory.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def part_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.download") / "scenes.zip"


def refusal(out: Path, url: str, **options: Any) -> str:
    """The message with which a download is refused; asserts that nothing looks done, and that it never slept."""
    before = contents(out) if out.is_dir() else None
    with pytest.raises(UserError) as caught:
        download(out, url, **{"wait": lambda seconds: None, **options})
    assert (contents(out) if out.is_dir() else None) == before
    return str(caught.value)


def sha(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_a_zip_becomes_a_checked_scenes_folder_and_nothing_else_is_left(
    site: Site, scenes: Path, data: bytes, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    site.script = [file(data)]
    arguments = [str(out), "--url", site.url, "--hash", sha(data).upper(), "--size", str(len(data))]
    assert run_script("download", arguments) == 0
    assert contents(out) == contents(scenes)
    assert list(out.parent.iterdir()) == [out]
    assert site.ranges == [None]
    printed = capfd.readouterr()
    assert "training" in printed.out and "validation" in printed.out and "5 classes" in printed.out
    assert printed.err == ""
    # And a second time there is nothing to do, not even where nothing can be written or fetched.
    changed = out.parent.stat().st_mtime_ns
    assert run_script("download", [str(out), "--url", "http://127.0.0.1:1/gone.zip"]) == 0
    assert "was there already" in capfd.readouterr().out
    assert out.parent.stat().st_mtime_ns == changed
    assert len(site.requests) == 1


def test_the_script_ends_in_a_folder_that_packs(site: Site, data: bytes, out: Path) -> None:
    site.script = [file(data)]
    subprocess.run([sys.executable, str(SCRIPT), str(out), "--url", site.url], check=True, timeout=50)
    counts = check_scenes(out)
    assert (counts.classes, counts.pairs) == (5, {"training": 3, "validation": 3})


def test_the_default_address_alone_has_a_checksum_by_itself(
    site: Site, scenes: Path, data: bytes, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert DEFAULT_URL.endswith(f"/{TOP}.zip")
    site.script = [file(data)]
    with monkeypatch.context() as patch:
        patch.setattr("fcn_dist.data.download.run.DEFAULT_URL", site.url)
        assert f"{DEFAULT_CHECKSUM.removeprefix('sha1:')} is needed" in refusal(out, site.url)
        download(out, site.url, checksum=sha(data))
    download(out.with_name("other"), site.url)
    assert contents(out) == contents(scenes) == contents(out.with_name("other"))


@pytest.mark.parametrize("top", ["", "any/"])
def test_the_scenes_folder_is_found_by_what_is_in_it(site: Site, scenes: Path, out: Path, top: str) -> None:
    memory = io.BytesIO(zipped(scenes, top))
    with ZipFile(memory, "a") as archive:
        archive.writestr("__MACOSX/any/images/._x", "")
        archive.writestr("readme.txt", "")
    site.script = [file(memory.getvalue())]
    download(out, site.url)
    assert contents(scenes).items() <= contents(out).items()


def test_an_empty_folder_and_a_link_to_one_are_taken(site: Site, scenes: Path, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    site.script = [file(data)]
    download(tmp_path / "link", site.url)
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == contents(scenes)


def test_the_zip_is_kept_if_asked_for(site: Site, data: bytes, out: Path) -> None:
    site.script = [file(data)]
    download(out, site.url, keep_zip=True)
    kept = out.with_name("ade.zip")
    assert kept.read_bytes() == data and sorted(out.parent.iterdir()) == [out, kept]
    other = out.with_name("ade.d")
    other.with_name("ade.d.zip").write_text("mine")
    assert "--keep-zip needs that name" in refusal(other, site.url, keep_zip=True)
    assert other.with_name("ade.d.zip").read_text() == "mine"


HALF = 2000  # bytes of a zip of about five times as many


def test_a_wrong_body_is_removed_and_not_asked_for_again_by_itself(
    site: Site, scenes: Path, data: bytes, out: Path
) -> None:
    wrong = data[:-1] + b"x"
    site.script = [file(wrong), file(data, etag='"v2"')]
    message = refusal(out, site.url, checksum=sha(data))
    assert sha(wrong).partition(":")[2] in message and sha(data).partition(":")[2] in message
    assert len(site.requests) == 1 and not list(out.parent.iterdir())
    download(out, site.url, checksum=sha(data))
    assert site.ranges == [None, None] and contents(out) == contents(scenes)


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(out), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_part(out: Path, size: int, process: subprocess.Popen[str]) -> None:
    # Bounded by the test's own time limit.
    while not (part_of(out).exists() and part_of(out).stat().st_size == size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_a_killed_run_is_gone_on_from_and_a_second_run_at_once_is_refused(
    site: Site, scenes: Path, data: bytes, out: Path
) -> None:
    over = threading.Event()
    site.script = [file(data, until=HALF, then=lambda connection: over.wait()), file(data)]
    process = start(out, "--url", site.url)
    try:
        wait_for_part(out, HALF, process)
        assert "another run is downloading" in refusal(out, site.url)
        assert part_of(out).stat().st_size == HALF and len(site.requests) == 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        over.set()
    assert not out.exists()
    done = start(out, "--url", site.url, "--hash", sha(data))
    assert done.communicate(timeout=50)[1] == "" and done.returncode == 0
    assert site.ranges == [None, f"bytes={HALF}-"] and site.requests[1]["if-range"] == '"v1"'
    assert contents(out) == contents(scenes) and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(("moment", "is_there"), [("os.sync", False), ("sync", True)])
def test_a_run_killed_while_it_unpacks_leaves_nothing_that_looks_whole(
    site: Site, scenes: Path, data: bytes, out: Path, moment: str, is_there: bool
) -> None:
    site.script = [file(data)]
    code = (
        "import os, sys, fcn_dist.data.download.run as module\n"
        f"module.{moment} = lambda *arguments: os.kill(os.getpid(), 9)\n"
        "module.download(sys.argv[1], sys.argv[2], keep_zip=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out), site.url], cwd=SCRIPT.parents[1], timeout=50)
    assert done.returncode == -signal.SIGKILL
    assert out.exists() == is_there and (not is_there or contents(out) == contents(scenes))
    counts = download(out, site.url, keep_zip=True)
    assert counts.downloaded != is_there and contents(out) == contents(scenes)
    assert len(site.requests) == 1, "what was whole is not fetched again"
    assert sorted(out.parent.iterdir()) == [out, out.with_name("ade.zip")]


def test_a_lock_that_a_run_which_has_just_ended_took_away_is_not_trusted(
    site: Site, scenes: Path, data: bytes, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.script = [file(data)]
    flock, lock = fcntl.flock, part_of(out).with_name("lock")
    taken: list[int] = []

    def late(descriptor: int, how: int) -> None:
        if not taken:
            lock.unlink()
        flock(descriptor, how)
        if how != fcntl.LOCK_UN:
            taken.append(os.fstat(descriptor).st_nlink)

    monkeypatch.setattr("fcn_dist.data.flocks.fcntl.flock", late)
    download(out, site.url)
    assert taken == [0, 1] and contents(out) == contents(scenes)


def test_a_disk_without_room_is_seen_before_anything_is_written(
    site: Site, scenes: Path, data: bytes, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.script = [file(data)]
    total = sum(map(len, contents(scenes).values()))
    frees = [1234, 1234, len(data), total - 1, total - 1]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=frees.pop(0)))
    assert f"{len(data):,} bytes more are needed, 1,234 are free" in refusal(out, site.url)
    assert part_of(out).stat().st_size == 0
    assert f"{total:,} bytes more are needed, {total - 1:,} are free" in refusal(out, site.url)
    assert part_of(out).read_bytes() == data
    monkeypatch.undo()
    download(out, site.url)
    assert site.ranges == [None, None] and contents(out) == contents(scenes)


def test_a_disk_that_becomes_full_costs_nothing_of_what_is_here(
    site: Site, scenes: Path, data: bytes, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.script = [file(data)]

    def fill(file: FileIO, block: bytes, folder: Path, needed: int | None) -> None:
        with diskspace.writing(folder, needed):
            file.write(block[:HALF])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("fcn_dist.data.download.fetch.write_all", fill)
        assert f"is full: {len(data):,} bytes more are needed" in refusal(out, site.url)
    with monkeypatch.context() as patch:
        patch.setattr("fcn_dist.data.download.extract.write_all", fill)
        assert "is full" in refusal(out, site.url)
    assert [path.name for path in part_of(out).parent.glob("scenes")] == []
    download(out, site.url)
    assert site.ranges == [None, f"bytes={HALF}-"] and contents(out) == contents(scenes)


def test_what_is_not_empty_is_neither_replaced_nor_added_to(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (scenes / "annotations" / "validation" / "validation_0001.png").unlink()
    before = contents(tmp_path)
    for name, word in (("file", "exists"), ("full", "no objectInfo file"), ("scenes", "validation_0001.jpg")):
        message = refusal(tmp_path / name, "http://127.0.0.1:1/a.zip")
        assert "is no whole scenes folder" in message and word in message
    assert contents(tmp_path) == before
    monkeypatch.chdir(tmp_path / "full")
    (tmp_path / "full" / "notes.txt").unlink()
    assert "is the current folder" in refusal(Path(), "http://127.0.0.1:1/a.zip")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            "images/training/training_0001.jpg",
            ["2 files", "annotations/training/training_0001.png: mask"],
        ),
        ("objectInfo150.txt", ["0 scenes folders", TOP]),
        ("annotations", ["0 scenes folders"]),
        ("images/validation", ["no split 'validation'"]),
    ],
)
def test_scenes_that_are_not_whole_are_refused_and_removed(
    site: Site, scenes: Path, out: Path, damage: str, words: list[str]
) -> None:
    if (scenes / damage).is_dir():
        shutil.rmtree(scenes / damage)
    else:
        (scenes / damage).unlink()
        (scenes / "images" / "training" / "odd.txt").write_text("")
    site.script = [file(zipped(scenes))]
    message = refusal(out, site.url)
    assert all(word in message for word in [site.url, *words]), message
    assert ".ade.download" not in message, "a folder that is gone by then"
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("body", [b"", b"not found, but with status 200"])
def test_what_is_no_zip_is_refused_and_removed(site: Site, out: Path, body: bytes) -> None:
    site.script = [file(body)]
    message = refusal(out, site.url)
    assert f"{site.url} is no zip file" in message and repr(body[:16]) in message
    assert not list(out.parent.iterdir())


def test_a_zip_with_two_scenes_folders_is_refused(site: Site, scenes: Path, out: Path) -> None:
    memory = io.BytesIO(zipped(scenes, "a/"))
    with ZipFile(memory, "a") as archive:
        for path in (path for path in scenes.rglob("*") if path.is_file()):
            archive.write(path, f"b/{path.relative_to(scenes)}")
    site.script = [file(memory.getvalue())]
    assert "2 scenes folders (at its top: a, b)" in refusal(out, site.url)


def test_a_zip_that_unpacks_to_too_much_is_kept_for_a_higher_bound(site: Site, scenes: Path, out: Path) -> None:
    (scenes / "zeros").write_bytes(bytes(10**6))
    memory = io.BytesIO()
    with ZipFile(memory, "w", ZIP_DEFLATED) as archive:
        for path in scenes.rglob("*"):
            archive.write(path, f"{TOP}/{path.relative_to(scenes)}")
    site.script = [file(memory.getvalue())]
    assert "raise --max-size" in refusal(out, site.url, max_size=10**6)
    download(out, site.url)
    assert len(site.requests) == 1 and contents(out) == contents(scenes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checksum": "219e16"}, ["--hash is '219e16'", "ALGORITHM:HEX"]),
        ({"checksum": "sha1:219e16"}, ["sha1:219e16"]),
        ({"checksum": "crc32:00000000"}, ["md5, sha1, sha256, sha512"]),
        ({"checksum": f"md5:{'g' * 32}"}, ["hexadecimal"]),
        ({"size": 0}, ["--size is 0"]),
        ({"max_size": -1}, ["--max-size is -1"]),
    ],
)
def test_options_that_make_no_sense_are_refused(out: Path, options: dict[str, Any], words: list[str]) -> None:
    message = refusal(out, "http://127.0.0.1:1/a.zip", **options)
    assert all(word in message for word in words), message
    assert not out.parent.exists()


def test_the_command_ends_with_code_2_and_one_message(site: Site, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    site.script = [status(404)]
    assert run_script("download", [str(out), "--url", site.url]) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith(f"error: {site.url} answers with HTTP status 404") and printed.out == ""
    assert "Traceback" not in printed.err
