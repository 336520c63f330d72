"""What pip installs for who has no checkout: the package, its commands, the page, recipes and configurations."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from fcn_dist.commands.names import COMMANDS
from fcn_dist.shipped import shipped

ROOT = Path(__file__).parents[1]
SOURCE = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "fcn_dist", "launch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a wheel of this checkout in wheels/, installed in prefix/."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "source").mkdir()
    for name in SOURCE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", "./source"]
    subprocess.run(build, cwd=folder, check=True, timeout=120)
    (wheel,) = (folder / "wheels").glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--ignore-installed", "--prefix", "prefix", str(wheel)]
    subprocess.run(install, cwd=folder, check=True, timeout=120)
    return folder


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The command as it is installed there."""
    packages = sysconfig.get_path("purelib", vars={"base": str(folder / "prefix")})
    return subprocess.run(
        [str(folder / "prefix" / "bin" / "fcn-dist"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": packages},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_wheel_has_the_page_recipes_and_configurations(folder: Path) -> None:
    (wheel,) = (folder / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for kept, below in (("fcn_dist/serving/page", ""), ("launch/recipes", "share/fcn-dist"), ("launch/zero", "share")):
        for path in (ROOT / kept).iterdir():
            assert any(name.endswith(f"{path.parent.name}/{path.name}") and below in name for name in names), path
    assert "fcn_dist/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "launch/", "benchmarks/"))]


@pytest.mark.slow
def test_an_installed_command_lists_all_commands_and_takes_recipes_by_name(folder: Path) -> None:
    listed = run(folder, "--help")
    assert listed.returncode == 0 and all(f"  {name:<12}" in listed.stdout for name in COMMANDS)
    train = ("train", "--shards", "nothing", "--output", "run", "--recipe", "camvid", "--deepspeed_config")
    unknown, known = run(folder, *train, "zero9"), run(folder, *train, "zero2_bf16")
    assert unknown.returncode == 2 and "zero9 cannot be read" in unknown.stderr and "launch/zero" in unknown.stderr
    assert known.returncode == 2 and "nothing" in known.stderr and "zero2" not in known.stderr


def test_a_bare_name_is_that_of_a_recipe_unless_a_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ROOT / "launch" / "recipes" / "camvid.yaml"
    monkeypatch.chdir(tmp_path)
    assert shipped(Path("camvid"), "recipes", ".yaml") == recipe
    for name in ("camvids", "camvid.yaml", "./other/camvid", "../recipes/camvid"):
        assert shipped(Path(name), "recipes", ".yaml") == Path(name)
    Path("camvid").touch()
    assert shipped(Path("camvid"), "recipes", ".yaml") == Path("camvid")


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_what_a_command_line_is_asked_first_imports_no_library(argument: str) -> None:
    code = (
        "import json, sys; from fcn_dist.commands.entry import main; main();"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    command = [sys.executable, "-W", "error", "-c", code, argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    libraries = {"torch", "numpy", "deepspeed", "webdataset", "cv2", "yaml", "jsonargparse", "shtab", "fsspec"}
    assert not libraries & set(json.loads(done.stdout.splitlines()[-1]))
    assert not done.stderr
