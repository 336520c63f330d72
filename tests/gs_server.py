"""A Google Cloud Storage emulator on loopback, found by clients through the environment."""

import logging
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from gcp_storage_emulator.server import create_server

BUCKET = "scenes"


@contextmanager
def serving_gs(folder: Path, prefix: str, port: int) -> Iterator[None]:
    """A server whose bucket holds the files of `folder` under `prefix`; the environment leads clients there."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    url = f"http://127.0.0.1:{port}"
    try:
        for path in folder.iterdir():
            name = quote(f"{prefix}/{path.name}", safe="")
            upload = urllib.request.Request(
                f"{url}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}",
                data=path.read_bytes(),
                headers={"Content-Type": "application/octet-stream"},
            )
            urllib.request.urlopen(upload, timeout=10).close()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", url)
            patch.setenv("FSSPEC_GS", '{"token": "anon"}')
            yield
    finally:
        server.stop()
