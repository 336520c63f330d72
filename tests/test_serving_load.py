"""Twenty clients at once, with large and with broken images: nothing falls over, and memory stays bounded."""

import io
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from served import Served, running

from fcn_dist.config import ModelConfig
from fcn_dist.deploy.modelfile import write_model_file
from fcn_dist.deploy.predict import Predictor
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.preprocess import TORCHVISION

pytestmark = pytest.mark.slow

CLIENTS, ROUNDS, REQUESTS = 20, 2, 8
MAX_BYTES = 4_000_000
SIDE = 1100  # of the largest image that is allowed
SLACK = 16_000_000  # connections, and what Python and the allocator keep of a hundred requests


def jpeg(side: int) -> bytes:
    """Noise, which compresses badly."""
    file = io.BytesIO()
    noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for what it makes of an image to be much larger than the image."""
    config = ModelConfig(width=0.125, head_width=16)
    description = ModelDescription(config, TORCHVISION, ("sea", "sky"), ((0, 0, 200), (90, 160, 255)), False)
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    write_model_file(path, description.build().state_dict(), description, {})
    return path


@pytest.fixture
def bodies() -> dict[str, tuple[bytes, int]]:
    """Kind -> upload, and the status that it must have."""
    large = jpeg(SIDE)
    assert 500_000 < len(large) < MAX_BYTES
    return {
        "large": (large, 200),
        "broken": (large[: len(large) // 2], 422),
        "too many pixels": (jpeg(SIDE + 100), 413),
        "too many bytes": (large + bytes(MAX_BYTES), 413),
        "nothing": (b"", 400),
    }


def test_twenty_clients_at_once_take_no_more_memory_than_one_client_and_their_uploads(
    model: Path, bodies: dict[str, tuple[bytes, int]], tmp_path: Path
) -> None:
    options = ("--max-bytes", str(MAX_BYTES), "--max-pixels", str(SIDE**2), "--requests", str(REQUESTS))
    with running(model, *options, folder=tmp_path) as server:
        idle = server.peak_memory()
        for _ in range(4):  # the allocator has what it wants after the second
            assert server.ask("POST", "/predict", bodies["large"][0]).status == 200
        one = server.peak_memory()
    bound = one + REQUESTS * MAX_BYTES + SLACK
    assert one - idle > 4 * SLACK, "else a second image at the same time would not be seen"
    with running(model, *options, folder=tmp_path) as server:
        found = storm(server, bodies)
        peak = server.peak_memory()
        print(f"idle {idle:,}, one image {one:,}, twenty clients {peak:,}, bound {bound:,} bytes")
        assert peak <= bound
        # It works on, and as before.
        labels = server.ask("POST", "/predict?format=png", bodies["large"][0])
        wanted = Predictor.from_file(model, "cpu", "float32").predict(
            np.asarray(Image.open(io.BytesIO(bodies["large"][0])))
        )
        assert (np.asarray(Image.open(io.BytesIO(labels.body))) == wanted).all()
        code, _, errors = server.stop()
        assert (code, errors) == (0, "")
    for kind, (_, status) in bodies.items():
        assert set(found[kind]) == {status}, kind
        assert found[kind][status] == CLIENTS * ROUNDS // len(bodies)
    assert found["busy"], "else nobody ever had to wait outside"


def storm(server: Served, bodies: dict[str, tuple[bytes, int]]) -> dict[str, Counter[int]]:
    """Statuses by the kind of upload, and those answers that said when to come again."""
    found = {kind: Counter[int]() for kind in (*bodies, "busy")}
    start = threading.Barrier(CLIENTS)
    kinds = list(bodies)

    def client(number: int) -> None:
        start.wait()
        for turn in range(ROUNDS):
            kind = kinds[(number + turn) % len(kinds)]
            while (answer := server.ask("POST", "/predict", bodies[kind][0])).status == 503:
                assert int(answer.headers["retry-after"]) >= 1 and "waiting already" in answer.detail
                found["busy"][503] += 1
                start_again.wait(0.2)
            found[kind][answer.status] += 1

    start_again = threading.Event()  # never set: a client that waits is not in a hurry
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(client, range(CLIENTS)))
    return found
