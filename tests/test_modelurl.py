"""Model files from elsewhere: fetched from a real server, and taken only with the hash that was stated."""

import argparse
import hashlib
from pathlib import Path
from typing import Any, cast

import fsspec
import loopback
import pytest
from loopback import Site
from tiny_models import DESCRIPTION, tiny_network

from fcn_dist.commands import evaluate
from fcn_dist.commands.entry import run_script
from fcn_dist.deploy.modelfile import write_model_file
from fcn_dist.deploy.modelurl import local_copy
from fcn_dist.deploy.predict import Predictor
from fcn_dist.errors import UserError


@pytest.fixture
def served(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Site, str]:
    """A site that has a model file, and its hash; an empty cache."""
    monkeypatch.setenv("FCN_DIST_CACHE", str(tmp_path / "cache"))
    write_model_file(tmp_path / "m.safetensors", tiny_network().state_dict(), DESCRIPTION, {})
    content = (tmp_path / "m.safetensors").read_bytes()
    site.script = [loopback.file(content)]
    return site, hashlib.sha256(content).hexdigest()


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_a_model_is_fetched_once_and_checked_each_time(served: tuple[Site, str], tmp_path: Path) -> None:
    site, digest = served
    predictor = Predictor.from_file(f"{site.url}#sha256={digest}", "cpu")
    assert predictor.classes == DESCRIPTION.classes and cached(tmp_path) == [f"{digest}.safetensors"]
    asked = len(site.requests)
    assert set(site.paths) == {"/scenes.zip"}  # nothing but what was named
    Predictor.from_file(site.url, "cpu", sha256=digest.upper())
    assert len(site.requests) == asked
    copy = local_copy(site.url, digest)
    copy.write_bytes(b"other")
    Predictor.from_file(site.url, "cpu", sha256=digest)
    assert len(site.requests) > asked


def test_another_file_is_refused_and_not_kept(served: tuple[Site, str], tmp_path: Path) -> None:
    site, digest = served
    other = hashlib.sha256(b"other").hexdigest()
    for nothing in ("", "abc", digest[:-1], digest + "\n"):
        for place in (site.url, str(Path(__file__))):
            with pytest.raises(UserError, match="64 hexadecimal digits are needed"):
                Predictor.from_file(place, "cpu", sha256=nothing)
    with pytest.raises(UserError, match=rf"has SHA-256 {digest}, and {other} is needed"):
        local_copy(f"{site.url}#sha256={other}")
    assert cached(tmp_path) == []


@pytest.mark.parametrize("reply", [loopback.status(404), loopback.status(500), loopback.file(b"x" * 999, until=10)])
def test_what_cannot_be_fetched_is_named_without_its_secrets(
    served: tuple[Site, str], tmp_path: Path, reply: loopback.Reply
) -> None:
    site, digest = served
    site.script = [reply]
    with pytest.raises(UserError, match=r"cannot be fetched") as caught:
        local_copy(f"{site.url}?token=secret", digest)
    assert "secret" not in str(caught.value) and cached(tmp_path) == []


def test_the_command_refuses_an_address_without_a_hash_and_asks_nobody(
    served: tuple[Site, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site, digest = served
    (tmp_path / "x.png").write_bytes(b"")
    for url in (site.url, f"{site.url}#sha256=12", f"{site.url}#md5={digest}"):
        assert run_script("predict", [url, str(tmp_path / "x.png"), "--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert "is not stated" in printed and "64 hexadecimal digits" in printed
    assert not site.requests


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch {}",
        "cmd://touch {}",
        "simplecache::http://127.0.0.1/{}",
        "file://x::{}",
        "http::touch {}",
        "zip://x::{}",
        "data:,{}",
        "nothing://{}",
    ],
)
def test_addresses_that_run_commands_or_wrap_others_are_refused(tmp_path: Path, url: str) -> None:
    marker = tmp_path / "ran"
    with pytest.raises(UserError, match=r"would run a command|is no plain address|no address that fsspec knows"):
        local_copy(url.format(marker), "0" * 64)
    assert not marker.exists()


def test_two_hashes_are_one_too_many(served: tuple[Site, str]) -> None:
    with pytest.raises(UserError, match="stated to have two hashes"):
        local_copy(f"{served[0].url}#sha256={served[1]}", "0" * 64)


def test_a_file_of_this_machine_is_held_against_a_stated_hash(served: tuple[Site, str], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    assert local_copy(path) == local_copy(path, served[1]) == path
    with pytest.raises(UserError, match="get the file again"):
        local_copy(path, "0" * 64)


@pytest.mark.parametrize("scheme", ["file", "local", "memory"])
def test_an_address_of_this_machine_is_taken_with_its_hash_alone(
    served: tuple[Site, str], tmp_path: Path, scheme: str
) -> None:
    digest, content = served[1], (tmp_path / "m.safetensors").read_bytes()
    url = f"{scheme}://{tmp_path}/m.safetensors"
    if scheme == "memory":
        fsspec.filesystem("memory").pipe_file(f"{tmp_path}/m.safetensors", content)
    with pytest.raises(UserError, match="is not stated"):
        local_copy(url)
    with pytest.raises(UserError, match=f"has SHA-256 {digest}"):
        local_copy(url, "0" * 64)
    assert Predictor.from_file(f"{url}#sha256={digest}", "cpu").classes == DESCRIPTION.classes
    assert cached(tmp_path) == [f"{digest}.safetensors"]


def test_a_folder_stands_for_its_model_file(served: tuple[Site, str], tmp_path: Path) -> None:
    path, other = tmp_path / "m.safetensors", tmp_path / "other.safetensors"
    assert local_copy(tmp_path) == local_copy(str(tmp_path), served[1]) == path
    assert Predictor.from_file(tmp_path, "cpu").info.path == path
    other.write_bytes(b"")
    with pytest.raises(UserError, match=r"has m.safetensors, other.safetensors; one model file, or one named model"):
        local_copy(tmp_path)
    other.rename(tmp_path / "model.safetensors")
    assert local_copy(tmp_path) == tmp_path / "model.safetensors"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no model file"):
        local_copy(tmp_path / "empty")


def test_what_is_no_file_is_refused_and_leaves_nothing(served: tuple[Site, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the model's name is empty"):
        local_copy("")
    with pytest.raises(UserError, match=r"is no file; the address of a model file is needed"):
        local_copy(f"file://{tmp_path}", served[1])
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_what_a_model_at_an_address_says_of_itself_is_shown(
    served: tuple[Site, str], capsys: pytest.CaptureFixture[str]
) -> None:
    site, digest = served
    assert run_script("convert", [f"{site.url}#sha256={digest}", "--show"]) == 0
    assert "in float32" in capsys.readouterr().out


def test_an_evaluation_does_not_tell_the_secrets_of_an_address(
    served: tuple[Site, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, digest = served
    monkeypatch.setattr(evaluate, "check_classes", lambda *_: None)
    options = argparse.Namespace(model=f"{site.url}?key=secret#sha256={digest}", step=None, weights=None)
    assert evaluate.load(options, cast(Any, None))[1] == site.url
