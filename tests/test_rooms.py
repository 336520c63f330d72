"""The directions of imports, as DESIGN's table of rooms states them; read from the source, so that none is missed."""

import ast
import importlib.metadata
import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fcn_dist"
FLOOR = "floor"


@dataclass(frozen=True)
class Room:
    """What the modules of a folder may import besides the standard library and each other."""

    rooms: frozenset[str]
    packages: frozenset[str]


def room(rooms: str, packages: str) -> Room:
    """The floor and its libraries are open to every room."""
    return Room(frozenset(rooms.split()) | {FLOOR}, frozenset(packages.split()) | {"rich", "jsonargparse", "yaml"})


ROOMS = {
    FLOOR: room("", "numpy"),
    "data": room("", "webdataset numpy cv2 PIL scipy fsspec aiohttp"),
    "model": room("", "torch safetensors numpy"),
    "scoring": room("data model", "torch numpy"),
    "checkpoints": room("model", "torch safetensors numpy"),
    "training": room("data model scoring checkpoints", "deepspeed torch safetensors numpy tensorboard wandb"),
    "deploy": room("data model scoring checkpoints training", "torch safetensors numpy cv2 PIL onnx onnxruntime"),
    "serving": room("model deploy", "fastapi starlette uvicorn python_multipart torch numpy PIL"),
    "reporting": room("data scoring checkpoints training deploy", "numpy cv2 PIL matplotlib tensorboard"),
    "launching": room("", ""),
    "commands": room(
        "data model scoring checkpoints training deploy serving reporting launching", "torch numpy cv2 PIL"
    ),
}
# What single modules may import beyond their room's list, and those that may import less.
ALSO = {
    "fcn_dist.addresses": {"fsspec"},
    "fcn_dist.model.kernels": {"triton"},
    "fcn_dist.model.poolkernels": {"triton"},
    "fcn_dist.data.loader": {"torch"},
    "fcn_dist.data.handoff": {"torch"},
    "fcn_dist.deploy.convert": {"deepspeed"},
    "fcn_dist.commands.completion": {"shtab"},
}
ONLY = {
    "fcn_dist.deploy.predict": room("model", "torch numpy safetensors cv2 PIL"),
    "fcn_dist.deploy.modelfile": room("model", "torch numpy safetensors"),
    "fcn_dist.deploy.modelurl": room("", "fsspec"),
    "fcn_dist.deploy.pictures": room("", "numpy cv2 PIL"),
    "fcn_dist.deploy.naming": room("", "numpy cv2 PIL"),
    "fcn_dist.deploy.lettering": room("", "numpy PIL"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    parts = module.split(".")
    if parts[-1] == "__main__":
        return "commands"  # it starts them, and must lie at the package's top to be found
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else FLOOR


def imports_of(source: str) -> set[str]:
    """Every module that is imported at any place but for type checkers alone; names of ours in full."""
    found: set[str] = set()
    for node in _run_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports hide where they lead"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def _run_nodes(tree: ast.AST) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        nodes += [child, *_run_nodes(child)]
    return nodes


def violations(module: str, source: str) -> list[str]:
    """The imports of `module` that its room does not allow."""
    own = room_of(module)
    allowed = ONLY.get(module, ROOMS[own])
    wrong = []
    for name in sorted(imports_of(source)):
        top = name.partition(".")[0]
        if top == "fcn_dist":
            # "fcn_dist" itself is the version number and lazily loaded names.
            if name != "fcn_dist" and room_of(name) not in allowed.rooms | {own}:
                wrong.append(name)
        elif top not in sys.stdlib_module_names and top not in allowed.packages | ALSO.get(module, set()):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_above_it(module: str) -> None:
    assert violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fcn_dist.errors", "from fcn_dist.data.stream import SampleStream"),
        ("fcn_dist.config", "import torch"),
        ("fcn_dist.data.stream", "import torch.nn"),
        ("fcn_dist.data.stream", "def f() -> None:\n    from fcn_dist.model import loss"),
        ("fcn_dist.data.loader", "import deepspeed"),
        ("fcn_dist.model.fcn", "from fcn_dist.data.shardset import ShardSet"),
        ("fcn_dist.model.fcn", "from fcn_dist import data\nimport fcn_dist.data"),
        ("fcn_dist.scoring.metrics", "import fcn_dist.training.loop as loop"),
        ("fcn_dist.training.loop", "from fcn_dist.deploy import convert"),
        ("fcn_dist.checkpoints.zero", "from deepspeed.utils import zero_to_fp32"),
        ("fcn_dist.deploy.predict", "from fcn_dist.checkpoints.store import open_checkpoint"),
        ("fcn_dist.deploy.predict", "import webdataset"),
        ("fcn_dist.deploy.pictures", "import torch"),
        ("fcn_dist.serving.app", "from fcn_dist.training import loop"),
        ("fcn_dist.deploy.predict", "import fastapi"),
        ("fcn_dist.commands.train", "import deepspeed"),
        ("fcn_dist.model.fcn", "try:\n    import requests\nexcept ImportError:\n    pass"),
    ],
)
def test_a_planted_import_is_found(module: str, line: str) -> None:
    assert violations(module, line)
    hidden = textwrap.indent(line, "    ")
    assert not violations(module, f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n{hidden}")


def test_every_folder_of_the_package_is_a_room() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(ROOMS) - {FLOOR}


# No command itself, but what several of them need.
COMMANDS_SHARE = {f"fcn_dist.commands.{name}" for name in ("anywhere", "names", "ranks", "termination", "views")}


def test_commands_are_imported_by_scripts_alone() -> None:
    importers = {
        name
        for name, path in MODULES.items()
        if any(imported.startswith("fcn_dist.commands") for imported in imports_of(path.read_text()) - COMMANDS_SHARE)
    }
    assert importers <= {"fcn_dist.commands.entry", "fcn_dist.__main__"}


def closure(module: str) -> set[str]:
    """What importing `module` may import, through any number of our own modules."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            waiting += imports_of(MODULES[name].read_text())
            waiting += [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)]
    return seen


@pytest.mark.parametrize("module", ["fcn_dist.deploy.predict", "fcn_dist.deploy.modelfile"])
def test_predicting_reaches_neither_training_nor_its_libraries_by_any_way(module: str) -> None:
    reached = closure(module)
    assert not {name.partition(".")[0] for name in reached} & {"deepspeed", "webdataset", "scipy"}
    assert {room_of(name) for name in reached if name.startswith("fcn_dist")} <= {FLOOR, "model", "deploy"}
    assert "fcn_dist.model.fcn" in reached


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fcn_dist", {"torch", "numpy", "deepspeed", "webdataset", "cv2"}),
        ("fcn_dist.deploy.pictures", {"torch", "deepspeed", "webdataset"}),
        ("fcn_dist.data.shardset", {"torch", "deepspeed", "webdataset"}),
        ("fcn_dist.deploy.predict", {"deepspeed", "webdataset"}),
    ],
)
def test_importing_a_module_does_not_load_what_it_does_not_need(module: str, absent: set[str]) -> None:
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    loaded = set(json.loads(done.stdout))
    assert module in loaded
    assert not loaded & absent


def test_deepspeed_is_imported_in_training_and_convert_alone() -> None:
    files = [*MODULES.values(), *(ROOT / "launch").glob("*.py"), *(ROOT / "shards").glob("*.py")]
    users = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if any(name.partition(".")[0] == "deepspeed" for name in imports_of(path.read_text()))
    }
    assert users  # else this test sees nothing
    assert all(user.startswith("fcn_dist/training/") or user == "fcn_dist/deploy/convert.py" for user in users)


def test_scripts_import_the_package_and_the_standard_library_alone() -> None:
    for path in (*(ROOT / "launch").glob("*.py"), *(ROOT / "shards").glob("*.py")):
        tops = {name.partition(".")[0] for name in imports_of(path.read_text())}
        assert tops - sys.stdlib_module_names <= {"fcn_dist"}, path


def test_nothing_beside_a_script_hides_a_module_by_its_name() -> None:
    # A script's folder comes first on Python's path.
    installed = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    assert {"torch", "deepspeed", "inspect"} <= installed
    for folder in ("launch", "shards"):
        beside = {path.stem for path in (ROOT / folder).iterdir() if path.is_dir() or path.suffix == ".py"}
        assert beside
        assert not beside & installed


def test_there_is_no_file_called_utils() -> None:
    assert not [path for folder in (PACKAGE, ROOT / "tests", ROOT / "launch") for path in folder.rglob("*util*.py")]
