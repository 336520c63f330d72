"""The server as scripts use it: a real process, real requests."""

import asyncio
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from fastapi import HTTPException
from numpy.typing import NDArray
from PIL import Image
from served import ROOT, Served, answer_on, form, running
from starlette.requests import Request
from starlette.types import Message
from tiny_models import DESCRIPTION, tiny_network

from fcn_dist.commands.entry import run_script
from fcn_dist.deploy.imagefiles import read_rgb
from fcn_dist.deploy.modelfile import write_model_file
from fcn_dist.deploy.predict import Predictor
from fcn_dist.model.devices import out_of_memory
from fcn_dist.serving.answers import preferred
from fcn_dist.serving.limits import Limits
from fcn_dist.serving.uploads import read_upload

ORIENTATION = 0x0112  # the EXIF tag
MAX_BYTES, MAX_PIXELS = 1_000_000, 40_000


def patches(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Patches of colour, so that several classes win."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]


def encoded(image: NDArray[np.uint8], kind: str = "PNG", orientation: int = 1) -> bytes:
    exif = Image.Exif()
    if orientation > 1:
        exif[ORIENTATION] = orientation
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, exif=exif)
    return file.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    # Sand has the colour of the sea.
    sky, sea, _, *others = DESCRIPTION.colours
    description = replace(DESCRIPTION, colours=(sky, sea, sea, *others))
    write_model_file(path, tiny_network().state_dict(), description, {"run": "beach"})
    return path


@pytest.fixture(scope="module")
def predictor(model: Path) -> Predictor:
    return Predictor.from_file(model, "cpu", "float32")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server runs, and where its temporary files would be."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def server(model: Path, scratch: Path) -> Iterator[Served]:
    options = ("--max-bytes", str(MAX_BYTES), "--max-pixels", str(MAX_PIXELS), "--requests", "3")
    with running(model, *options, folder=scratch) as served:
        yield served


def labels_in(png: bytes) -> NDArray[np.uint8]:
    picture = Image.open(io.BytesIO(png))
    assert picture.mode == "L" and picture.format == "PNG"
    return np.asarray(picture)


@pytest.mark.parametrize(("kind", "media"), [("PNG", "image/png"), ("BMP", "application/octet-stream"), ("TIFF", "")])
def test_a_body_that_is_an_image_is_labelled_as_the_predictor_does(
    server: Served, predictor: Predictor, kind: str, media: str
) -> None:
    image = patches(90, 140)
    answer = server.ask("POST", "/predict?format=png", encoded(image, kind), {"Content-Type": media} if media else {})
    assert answer.status == 200 and answer.headers["content-type"] == "image/png"
    wanted = predictor.predict(image)
    assert len(np.unique(wanted)) > 2 and (labels_in(answer.body) == wanted).all()


@pytest.mark.parametrize("field", ["file", "anything"])
def test_a_form_s_file_is_turned_upright_and_named_in_the_figures(
    server: Served, predictor: Predictor, field: str
) -> None:
    stored = patches(60, 100, seed=4)
    body, headers = form(encoded(stored, orientation=6), "my scene.png", field)
    answer = server.ask("POST", "/predict", body, headers)
    labels, counts = np.unique(predictor.predict(np.rot90(stored, -1)), return_counts=True)
    assert answer.headers["content-type"] == "application/json"
    found = answer.json
    assert (found["image"], found["width"], found["height"]) == ("my scene.png", 60, 100)
    assert {one["label"]: one["pixels"] for one in found["classes"]} == dict(zip(labels, counts, strict=True))
    assert [one["name"] for one in found["classes"]] == [
        DESCRIPTION.classes[one["label"] - 1] for one in found["classes"]
    ]
    shares = [one["share"] for one in found["classes"]]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", "json"),
        ("*/*", "json"),
        ("image/png", "png"),
        ("image/*", "png"),
        ("application/json;q=0.4, image/png;q=0.5", "png"),
        ("IMAGE/PNG;q=0, */*;q=0.1", "json"),
        ("application/json, image/png", "json"),
        ("text/html", None),
        ("image/png;q=0", None),
        ("text/html, */*;q=0.8", "json"),
    ],
)
def test_the_format_is_what_the_accept_header_likes_best(accept: str, wanted: str | None) -> None:
    assert preferred(accept) == wanted


def test_the_query_goes_before_the_accept_header_and_neither_is_an_answer_of_its_own(server: Served) -> None:
    body = encoded(patches(8, 8))
    png = {"Accept": "image/png"}
    assert server.ask("POST", "/predict", body, png).headers["content-type"] == "image/png"
    assert server.ask("POST", "/predict?format=json", body, png).headers["content-type"] == "application/json"
    assert server.ask("POST", "/predict", body, {"Accept": "text/html"}).status == 406


def test_the_model_says_its_classes_colours_and_source(server: Served) -> None:
    card = server.ask("GET", "/model").json
    assert [one["name"] for one in card["classes"]] == list(DESCRIPTION.classes)
    assert [one["label"] for one in card["classes"]] == [1, 2, 3, 4, 5]
    colours = [tuple(bytes.fromhex(one["colour"][1:])) for one in card["classes"]]
    assert colours[:2] == list(DESCRIPTION.colours[:2]) and len(set(colours)) == 5
    assert card["source"] == {"run": "beach"} and card["model"] == "tiny.safetensors"
    assert (card["max_bytes"], card["max_pixels"]) == (MAX_BYTES, MAX_PIXELS)
    assert server.ask("GET", "/health").json == {"status": "ok", "requests": 0}


PNG = encoded(patches(40, 40))
LARGE = encoded(np.zeros((300, 300, 3), np.uint8))
FORM_HEADERS = form(b"")[1]


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"", {}, 400, "the body is empty"),
        (b"no image", {}, 422, "cannot be decoded (it is no JPEG, PNG, BMP, GIF, PPM, TIFF, WEBP file)"),
        (PNG[: len(PNG) // 2], {}, 422, "cannot be decoded"),
        # A program of another kind of file is never run.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {}, 422, "it is no JPEG, PNG, "),
        (LARGE, {}, 413, "the image is 300x300; at most 40,000 pixels"),
        (encoded(patches(1, 1300)), {}, 413, "the image is 1300x1; at most 40,000 pixels (32 at least count"),
        (LARGE[:60], {}, 413, "the image is 300x300"),  # its header tells, and nothing is decoded
        (b"{}", {"Content-Type": "application/json"}, 415, "the body is application/json; an image as the body"),
        (PNG, {"Content-Type": "application/x-www-form-urlencoded"}, 415, "x-www-form-urlencoded"),
        (PNG, FORM_HEADERS, 400, "the form cannot be read"),
        (form(PNG)[0][:-9], FORM_HEADERS, 400, "ends too early"),
        (PNG, {"Content-Type": "multipart/form-data"}, 400, "names no boundary"),
        (PNG, {"Content-Type": f"multipart/form-data; boundary={'x' * 300}"}, 400, "the form cannot be read"),
        (b"--the boundary--\r\n", FORM_HEADERS, 400, "the form has no file"),
        (form(PNG)[0][:-18] + form(PNG)[0], FORM_HEADERS, 400, "the form has several files"),
        (bytes(MAX_BYTES + 1), {}, 413, "at most 1 MB"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value if isinstance(value, str) else "",
)
def test_what_cannot_be_labelled_is_refused_with_a_message(
    server: Served, body: bytes, headers: dict[str, str], status: int, message: str
) -> None:
    answer = server.ask("POST", "/predict", body, headers)
    assert answer.status == status and message in answer.detail and "Traceback" not in answer.detail
    assert server.ask("POST", "/predict?format=bmp", PNG).status == 422
    assert server.ask("POST", "/predict", PNG).status == 200


def test_an_upload_that_is_announced_too_large_is_refused_unread(server: Served) -> None:
    with server.begin(b"", length=10**12) as client:
        assert answer_on(client).status == 413


def test_a_client_that_sends_all_before_it_listens_gets_the_message_too(server: Served) -> None:
    answer = server.ask("POST", "/predict", bytes(40 * MAX_BYTES))
    assert answer.status == 413 and "the upload is 40 MB; at most 1 MB" in answer.detail


def test_an_upload_of_unknown_length_is_read_no_further_than_allowed(server: Served) -> None:
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    with server.begin(b"", more="Transfer-Encoding: chunked") as client:
        for _ in range(MAX_BYTES // 0x10000 + 1):
            client.sendall(chunk)
        answer = answer_on(client)  # without an end of the body
        with pytest.raises(ConnectionError):
            while True:
                client.sendall(chunk)
    assert answer.status == 413 and "at most 1 MB" in answer.detail


def test_an_upload_that_does_not_go_on_is_given_up() -> None:
    async def silence() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    request = Request({"type": "http", "method": "POST", "headers": []}, silence)
    with pytest.raises(HTTPException, match=r"took longer than 0\.01 s") as refusal:
        asyncio.run(read_upload(request, Limits(upload_seconds=0.01)))
    assert refusal.value.status_code == 408


def test_accept_may_stand_in_several_lines(server: Served) -> None:
    head = f"Content-Length: {len(PNG)}\r\nAccept: text/html\r\nAccept: image/png"
    with server.begin(PNG, more=head) as client:
        assert labels_in(answer_on(client).body).size


def test_when_too_many_wait_the_next_is_told_when_to_come_again(server: Served) -> None:
    waiting = [server.begin(PNG[:-20], length=len(PNG)) for _ in range(3)]
    while server.ask("GET", "/health").json["requests"] < 3:
        pass
    answer = server.ask("POST", "/predict", PNG)
    assert answer.status == 503 and 1 <= int(answer.headers["retry-after"]) <= 60
    assert "3 images are waiting already" in answer.detail
    for client in waiting:
        client.sendall(PNG[-20:])
        assert answer_on(client).status == 200
        client.close()
    assert server.ask("POST", "/predict", PNG).status == 200


def test_who_goes_away_makes_room(server: Served) -> None:
    for _ in range(4):
        server.begin(PNG[:-20], length=len(PNG)).close()
    while server.ask("GET", "/health").json["requests"]:
        pass
    assert server.ask("POST", "/predict", PNG).status == 200


def test_names_and_pages_of_other_sites_are_refused(server: Served) -> None:
    for host, status in [
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("127.0.0.1.evil.example", 421),
        ("[", 421),
        (f"localhost:{server.port}", 200),
        ("[::1]:8000", 200),
    ]:
        assert server.ask("GET", "/model", headers={"Host": host}).status == status, host
    own = f"http://127.0.0.1:{server.port}"
    for origin, status in [
        ("http://evil.example", 403),
        ("null", 403),
        ("http://127.0.0.1:1", 403),
        ("http://[", 403),
        (own, 200),
    ]:
        assert server.ask("POST", "/predict", PNG, {"Origin": origin}).status == status, origin


@pytest.mark.parametrize(
    ("path", "host", "status"), [("/", "localhost", 200), ("/nowhere", "localhost", 404), ("/", "evil.example", 421)]
)
def test_every_answer_tells_browsers_what_the_page_may_do(server: Served, path: str, host: str, status: int) -> None:
    answer = server.ask("GET", path, headers={"Host": host})
    assert answer.status == status and answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy


def test_the_pages_hold_no_script_or_style_and_lead_nowhere_else(server: Served) -> None:
    for path in ("/", "/docs"):
        page = server.ask("GET", path).body.decode()
        assert not re.search(r"<script(?! type=\"module\" src)|<style| style=| on\w+=", page)
        for target in re.findall(r'(?:src|href)="([^"]*)"', page):
            assert target.startswith("/") and server.ask("GET", target).status == 200, target
    for file in (files("fcn_dist.serving") / "page").iterdir():
        addresses = set(re.findall(r"https?://[\w.:]+", file.read_text()))
        assert addresses <= {"http://127.0.0.1:8000", "http://www.w3.org"}, file
        assert server.ask("GET", f"/page/{file.name}").body == file.read_bytes()


def test_the_page_for_scripts_tells_all_that_openapi_does(server: Served) -> None:
    described = server.ask("GET", "/openapi.json").json["paths"]
    page = server.ask("GET", "/docs").body.decode()
    assert set(described) == {"/predict", "/model", "/health"}
    for path, operations in described.items():
        for method, operation in operations.items():
            assert f"{method.upper()} {path}" in page
            for status in set(operation["responses"]) - {"200"}:
                assert re.search(rf"<td>[\d, ]*{status}", page), status
    told = {status for row in re.findall(r"<tr><td>([\d, ]+)</td>", page) for status in row.split(", ")}
    assert told == set(described["/predict"]["post"]["responses"]) - {"200"}
    assert set(described["/predict"]["post"]["requestBody"]["content"]) >= {"image/*", "multipart/form-data"}


def test_nothing_is_stored(server: Served, scratch: Path) -> None:
    body, headers = form(encoded(np.random.default_rng(0).integers(0, 256, (190, 200, 3), np.uint8)))
    head = f"Content-Type: {headers['Content-Type']}\r\nContent-Length: {len(body)}"
    with server.begin(body[:-1], more=head) as client:
        while not server.ask("GET", "/health").json["requests"]:
            pass
        opened = [
            str(link.readlink()) for link in Path(f"/proc/{server.process.pid}/fd").iterdir() if link.is_symlink()
        ]
        assert not [path for path in opened if path.startswith(str(scratch))]
        client.sendall(body[-1:])
        assert answer_on(client).status == 200
    # torch makes an empty folder of its own.
    assert not [path for path in scratch.rglob("*") if not path.is_dir()]


def test_a_port_in_use_is_told_before_the_model_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run_script("serve", [str(tmp_path / "none.safetensors"), "--port", str(port)]) == 2
    message = capsys.readouterr().err
    assert f"error: 127.0.0.1, port {port}, cannot be listened at (Address already in use" in message
    for options in (
        ["--port", "70000"],
        ["--port", "-1"],
        ["--host", "nowhere.invalid"],
        ["--max-pixels", "0"],
        ["--requests", "-1"],
    ):
        assert run_script("serve", [str(tmp_path / "none.safetensors"), *options]) == 2
        message = capsys.readouterr().err
        assert "none.safetensors" not in message and options[1] in message
    assert run_script("serve", [str(tmp_path / "none.safetensors"), "--port", "0"]) == 2
    assert "none.safetensors" in capsys.readouterr().err


def test_without_the_extra_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serving = ("fcn_dist.serving.", "fcn_dist.commands.serve")
    with patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.startswith(serving)]:
            del sys.modules[name]
        sys.modules["fastapi"] = None  # type: ignore[assignment]
        assert run_script("serve", [str(tmp_path / "none.safetensors")]) == 2
    assert "needs fastapi" in (message := capsys.readouterr().err) and "pip install 'fcn-dist[serve]'" in message


@pytest.mark.parametrize("elements", [1 << 50, None])
def test_memory_that_runs_out_is_told_from_bugs(elements: int | None) -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.empty(elements) if elements else torch.zeros(2).view(3)
    assert out_of_memory(failure.value) == (elements is not None)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_commands_of_the_documentation_work_as_written(
    server: Served, predictor: Predictor, tmp_path: Path
) -> None:
    Image.fromarray(patches(60, 80)).save(tmp_path / "scene.jpg")
    text = (ROOT / "docs" / "serving.md").read_text() + server.ask("GET", "/docs").body.decode()
    commands = [
        line.strip().removeprefix("<pre>").removesuffix("</pre>") for line in text.splitlines() if "curl " in line
    ]
    assert len(commands) == 6
    wanted = predictor.predict(read_rgb(tmp_path / "scene.jpg"))
    for command in commands:
        here = command.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace("curl ", "curl --noproxy '*' -sf ")
        done = subprocess.run(["bash", "-c", here], cwd=tmp_path, capture_output=True, timeout=60, check=True)
        written = set(tmp_path.glob("*.png"))
        if written:
            assert (labels_in(written.pop().read_bytes()) == wanted).all()
        else:
            assert json.loads(done.stdout)["classes"][0]["pixels"] == np.bincount(wanted.ravel()).max()
        for path in tmp_path.glob("*.png"):
            path.unlink()
    assert sum("-o " in command for command in commands) == 4


STUCK = """
import sys, threading
from fcn_dist.commands.entry import run_script
from fcn_dist.deploy.predict import Predictor
Predictor.predict = lambda self, image: print("predicting", flush=True) or threading.Event().wait()
sys.exit(run_script("serve"))
"""


IMPATIENT = """
import sys
from fcn_dist.commands.entry import run_script
from fcn_dist.serving import server
server.PATIENCE_SECONDS = 0.3
sys.exit(run_script("serve"))
"""


def test_a_connection_without_a_request_is_closed_after_a_while_and_a_slow_upload_is_not(
    model: Path, tmp_path: Path
) -> None:
    half_a_head = b"GET /health HTTP/1.1\r\nHost: loc"
    with running(model, folder=tmp_path, program=("-c", IMPATIENT)) as server, ExitStack() as opened:
        assert server.ask("GET", "/health").status == 200  # it accepts: before, its queue is a short one
        slow = opened.enter_context(server.begin(PNG[:-9], length=len(PNG)))
        idle = [
            opened.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60)) for _ in range(300)
        ]
        assert hung_up(idle[0], half_a_head) and all(map(hung_up, idle[1:]))
        slow.sendall(PNG[-9:])
        assert answer_on(slow).status == 200
        assert hung_up(slow, half_a_head), "also after a request"
        assert server.ask("GET", "/health").status == 200


def hung_up(client: socket.socket, words: bytes = b"") -> bool:
    """Whether the server ends the connection, wherever in what is said to it."""
    try:
        client.sendall(words)
        return client.recv(1000) == b""
    except ConnectionError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once_whatever_is_in_flight(model: Path, tmp_path: Path, signum: int) -> None:
    """A prediction that cannot be interrupted, an upload that waits for its turn, and half an upload."""
    with running(model, folder=tmp_path, program=("-c", STUCK)) as server:
        clients = [server.begin(PNG)]
        assert server.process.stdout
        assert "predicting\n" in iter(server.process.stdout.readline, "")
        clients += [server.begin(PNG), server.begin(PNG[:-20], length=len(PNG))]
        while server.ask("GET", "/health").json["requests"] < 3:
            pass
        code, _, errors = server.stop(signum)
        assert (code, errors) == (0, "")
        for client in clients:
            answer = answer_on(client)
            assert answer.status == 503 and "stopping" in answer.detail
            client.close()
