"""What someone has who installed the package for inference alone: in an environment of their own, made by pip."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import DESCRIPTION, tiny_network

from fcn_dist.commands import entry
from fcn_dist.commands.entry import run_script
from fcn_dist.deploy.modelfile import write_model_file

ROOT = Path(__file__).parents[1]
ABSENT = ("deepspeed", "webdataset", "scipy")


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_the_inference_extra_alone_predicts_and_names_the_extra_of_other_commands(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet"]
    torch = next(line.strip() for line in (ROOT / "setup.cfg").read_text().splitlines() if "torch==" in line)
    # By itself first: without a network, and without its file, there is nothing to see here.
    installed = subprocess.run([*pip, torch], capture_output=True, text=True, timeout=400, check=False)
    if installed.returncode:
        pytest.skip(f"pip cannot install {torch} here: {installed.stderr.strip().splitlines()[-1:]}")
    # Of a copy: building leaves its folders beside the source.
    (tmp_path / "source").mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    shutil.copytree(ROOT / "fcn_dist", tmp_path / "source" / "fcn_dist")
    subprocess.run([*pip, f"{tmp_path / 'source'}[inference]"], check=True, timeout=300)
    code = f"import importlib.util as u, json; print(json.dumps([u.find_spec(n) is None for n in {ABSENT}]))"
    found = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == [True] * len(ABSENT)

    write_model_file(tmp_path / "m.safetensors", tiny_network().state_dict(), DESCRIPTION, {})
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / "photo.jpg")
    command = [str(tmp_path / "venv" / "bin" / "fcn-dist")]
    predict = ["predict", "m.safetensors", "photo.jpg", "--output", "out"]
    subprocess.run(command + predict, cwd=tmp_path, check=True, timeout=120)
    assert Image.open(tmp_path / "out" / "photo.png").size == (60, 40)
    train = subprocess.run(
        [*command, "evaluate", "--model", "m.safetensors", "--shards", "shards"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert train.returncode == 2
    assert "not installed; install the extra: pip install 'fcn-dist[train]'" in " ".join(train.stderr.split())


@pytest.mark.parametrize(("package", "code"), [("deepspeed.runtime", 2), ("onnx", 2), ("numpy", 1)])
def test_a_package_of_an_extra_that_is_missing_is_for_the_user_to_install(
    package: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(entry, "import_module", missing)
    if code == 1:
        with pytest.raises(ModuleNotFoundError):
            run_script("train", [])
        return
    assert run_script("train", []) == code
    extra = "train" if package.startswith("deepspeed") else "onnx"
    assert f"pip install 'fcn-dist[{extra}]'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["m.safetensors"], 2)])
def test_help_of_serve_needs_no_extra_and_serving_names_it(arguments: list[str], code: int) -> None:
    script = f"import runpy, sys; sys.modules['fastapi'] = None; sys.argv[1:] = {arguments}; "
    script += "runpy.run_path('launch/serve.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    assert ("--max-pixels" in done.stdout) == (code == 0) and ("fcn-dist[serve]" in done.stderr) == (code == 2)
