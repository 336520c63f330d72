"""The keys that docs/formats.md documents are those of files as they are written: none is missing, none is made up."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import run_alone
from test_train import TIME_LIMIT, TRAIN, lines

from fcn_dist.commands.entry import run_script
from fcn_dist.data.crops import BadSample

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "formats.md").read_text()
TINY = ("data.crop=[32,32]", "data.workers=0", "model.width=0.0625", "model.head_width=8", "train.global_batch=2")
MORE = ("schedule.learning_rate=0.01", "log.every=1", "log.layers=1", "checkpoint.every=1")
EVERY_LINE = {"event", "step", "time"}


def rows(heading: str) -> list[list[str]]:
    """The table under a heading, without its head."""
    section = re.search(rf"^## [^\n]*{re.escape(heading)}.*?(?=^## |\Z)", PAGE, re.M | re.S)
    assert section
    cells = [line.strip("| ").split(" | ") for line in section[0].splitlines() if line.startswith("|")]
    return cells[2:]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def keys(heading: str) -> set[str]:
    """What its first column names."""
    return {key for row in rows(heading) for key in quoted(row[0])}


def events() -> dict[str, set[str]]:
    """The keys of each event of metrics.jsonl."""
    return {next(iter(quoted(row[0]))): quoted(re.sub(r"\(.*?\)", "", row[2])) for row in rows("metrics.jsonl")}


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, whole with evaluation and checkpoints."""
    folder = tmp_path_factory.mktemp("formats")
    settings = [word for value in (*TINY, *MORE) for word in ("--set", value)]
    run_alone(TRAIN, ["--shards", str(shards), "--output", "run", "--steps", "2", *settings], folder, TIME_LIMIT)
    return folder / "run"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_shards_and_their_index(shards: Path) -> None:
    split = shards / "training"
    assert keys("`OUT/SPLIT/`") == set(np.load(split / "training-000000.members.npy").dtype.names)
    index = read(split / "index.json")
    assert keys("`index.json` of a split") == set(index)
    listed = {key: row[1] for row in rows("`index.json` of a split") for key in quoted(row[0])}
    assert quoted(listed["shardlist"]) == set(index["shardlist"][0])
    assert quoted(listed["label_rule"]) == set(index["label_rule"])


def test_a_run_folder(run: Path) -> None:
    assert keys("`RUN/run.json`") == set(read(run / "run.json"))
    manifest = read(run / "checkpoints" / "step-00000002" / "manifest.json")
    heading = "`RUN/checkpoints/step-00000080/`"
    assert keys(heading) == set(manifest)
    listed = {next(iter(quoted(row[0]))): quoted(row[1]) for row in rows(heading)}
    assert listed["state"] == set(manifest["state"])
    assert all(listed["files"] == set(file) for file in manifest["files"].values())


def test_the_events_of_a_run(run: Path) -> None:
    documented = events()
    seen = {"start", "train", "layers", "evaluate", "checkpoint"}
    for event in seen:
        (line, *_) = lines(run, event)
        assert documented[event] - {"auxiliary_loss"} == set(line) - EVERY_LINE, event
    assert {line["event"] for line in map(json.loads, (run / "metrics.jsonl").open())} == seen


def test_every_event_that_the_code_writes_is_documented_with_its_keys() -> None:
    found: dict[str, set[str]] = {}
    for path in (ROOT / "fcn_dist" / "training").glob("*.py"):
        tree = ast.parse(path.read_text())
        constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ournal.write"):
                name = node.args[0]
                event = name.value if isinstance(name, ast.Constant) else constants[ast.unparse(name)]
                found[str(event)] = {keyword.arg for keyword in node.keywords if keyword.arg}
    documented = events()
    assert set(found) == set(documented)
    for event in ("start", "layers", "not_finite", "out_of_memory"):  # which name every key where they are written
        assert found[event] == documented[event], event
    assert all(found[event] <= documented[event] for event in found)
    assert documented["bad_sample"] == set(BadSample._fields)
    assert documented["straggler"] - found["straggler"] == {
        f"{name}_seconds" for name in ("data", "computing", "waiting")
    }


def test_scores_and_predictions(run: Path, shards: Path, tmp_path: Path) -> None:
    scores_path, model = tmp_path / "scores.json", tmp_path / "model.safetensors"
    assert run_script("convert", [str(run), str(model)]) == 0
    looks = ["--flip", "--precision", "bfloat16"]
    command = ["--model", str(model), "--shards", str(shards), "--json", str(scores_path), *looks]
    assert run_script("evaluate", command) == 0
    scores = read(scores_path)
    assert scores["precision"] == "bfloat16" and scores["views"]["flip"] is True
    assert quoted(next(row[1] for row in rows("`scores.json`") if "`views`" in row[0])) == set(scores["views"])
    assert keys("`scores.json`") == set(scores)
    listed = {key: quoted(row[1]) for row in rows("`scores.json`") for key in quoted(row[0])}
    for key in ("official", "paper"):
        assert listed[key] == set(scores[key])
    assert listed["classes"] == set(scores["classes"][0])
    images = tmp_path / "images"
    images.mkdir()
    (images / "broken.jpg").write_bytes(b"no image")
    (images / "scene.jpg").write_bytes(sorted((run / "predictions").rglob("*.jpg"))[0].read_bytes())
    assert run_script("predict", [str(model), str(images), "--output", str(tmp_path / "out")]) == 2
    told = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").open()]
    broken, whole = sorted(told, key=len)
    assert set(broken) == {"image", "error"}
    assert keys("`predictions.jsonl`") == set(whole) | {"error"}
    listed = {key: quoted(row[1]) for row in rows("`predictions.jsonl`") for key in quoted(row[0])}
    assert listed["classes"] == set(whole["classes"][0])
