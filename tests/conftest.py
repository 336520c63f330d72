"""Options, markers and the fixtures that several test files share."""

import io
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import settings
from loopback import Site, serving
from numpy.typing import NDArray
from PIL import Image

from fcn_dist.data.scenes.images import ORIENTATION_TAG

# No timing is asserted, and a failure on one machine is the same on another.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# Before torch is imported: on tensors as small as the tests', its threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MakeScenes = Callable[..., Path]
HEIGHT, WIDTH = 24, 32  # of the scenes that make_scenes draws by default


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run tests marked slow as well")


def pytest_configure() -> None:
    # Started in the background, a shell has these ignored, and so would every process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        _skip(items, "slow", "slow; run with --slow")
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "no CUDA device")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real scenes and weights beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny shard set: eleven training scenes, so that epochs end inside global batches, and five to validate on."""
    from fcn_dist.data.packing.run import pack
    from fcn_dist.data.synthetic import render

    folder = tmp_path_factory.mktemp("shards")
    render(folder / "scenes", training=11, validation=5, size=(48, 64), seed=3)
    pack(folder / "scenes", folder / "packed", samples_per_shard=4)
    return folder / "packed"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(n)` mounts a file system of n kilobytes and returns its folder, or skips the test if none can be."""
    folder = tmp_path / "disk"

    def mount(kilobytes: int) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True, check=False)
        if mounted.returncode:
            folder.rmdir()
            pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def make_scenes(tmp_path: Path) -> MakeScenes:
    """`make_scenes(n=4, ...)` writes a small valid scenes folder and returns its path.

    Images are smooth, so that JPEG keeps them closely; labels are blocks of 0..num_classes, each drawn from `seed`.
    """

    def make(
        n: int = 4,
        num_classes: int = 5,
        size: tuple[int, int] = (HEIGHT, WIDTH),
        splits: tuple[str, ...] = ("training", "validation"),
        name: str = "scenes",
        seed: int = 0,
    ) -> Path:
        rng = np.random.default_rng(seed)
        root = tmp_path / name
        rows = "".join(f"{i}\t0.1\t10\t1\tclass {i}\n" for i in range(1, num_classes + 1))
        for split in splits:
            for kind in ("images", "annotations"):
                (root / kind / split).mkdir(parents=True)
            for number in range(n):
                stem = f"{split}_{number:04d}"
                height, width = size
                image = cv2.resize(rng.integers(0, 256, (3, 4, 3), np.uint8), (width, height))
                blocks = rng.integers(0, num_classes + 1, (3, 4), np.uint8)
                labels = cv2.resize(blocks, (width, height), interpolation=cv2.INTER_NEAREST)
                cv2.imwrite(str(root / "images" / split / f"{stem}.jpg"), image)
                cv2.imwrite(str(root / "annotations" / split / f"{stem}.png"), labels)
        (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + rows)
        return root

    return make


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A scripted HTTP server on loopback, which no proxy of this machine's stands before."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as running:
        yield running


def pixels(data: bytes | Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(data if isinstance(data, Path) else io.BytesIO(data)))


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` with its contents."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def smooth(height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """RGB that no turn or flip leaves as it is."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 200 // height, x * 200 // width, (x + y) * 2], -1).astype(np.uint8)


def save_oriented(path: Path, stored: NDArray[np.uint8], orientation: int, form: str = "JPEG") -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    Image.fromarray(stored).save(path, form, exif=exif, quality=95)
