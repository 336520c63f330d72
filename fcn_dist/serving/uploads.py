"""An HTTP request in; the image file it carries, in memory alone, and what to call it out."""

import asyncio
import io
from dataclasses import dataclass, field

from fastapi import HTTPException
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from fcn_dist.serving.limits import Limits
from fcn_dist.sizes import show_size

FORM = "multipart/form-data"
RAW = ("application/octet-stream", "")  # curl -T says nothing
ACCEPTED = f"an image as the body (Content-Type: image/jpeg, image/png, ...) or a file in {FORM}"


@dataclass
class Upload:
    """An image file as it came."""

    name: str
    file: io.BytesIO = field(default_factory=io.BytesIO)


async def read_upload(request: Request, limits: Limits) -> Upload:
    """Read the body, no further than `max_bytes`.

    HTTP errors: 400 for a form that is none or has no file, 408 after `upload_seconds`, 413 for too many bytes,
    415 for another kind of body.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    content_type = kind.decode("latin-1").lower()
    if content_type != FORM and content_type not in RAW and not content_type.startswith("image/"):
        raise HTTPException(415, f"the body is {content_type}; {ACCEPTED} is needed")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.max_bytes:
        raise _too_large(show_size(int(length)), limits)
    sink = _Form(options.get(b"boundary")) if content_type == FORM else _Raw()
    try:
        async with asyncio.timeout(limits.upload_seconds):
            received = 0
            async for chunk in request.stream():
                received += len(chunk)
                if received > limits.max_bytes:
                    raise _too_large("too large", limits)
                sink.write(chunk)
    except TimeoutError as error:
        raise HTTPException(408, f"the upload took longer than {limits.upload_seconds:g} s; try again") from error
    return sink.finish()


def _too_large(found: str, limits: Limits) -> HTTPException:
    return HTTPException(
        413, f"the upload is {found}; at most {show_size(limits.max_bytes)} are taken; shrink the image"
    )


class _Raw:
    """The body is the image."""

    def __init__(self) -> None:
        self._upload = Upload("the image")

    def write(self, chunk: bytes) -> None:
        self._upload.file.write(chunk)

    def finish(self) -> Upload:
        """Rewound."""
        if not self._upload.file.tell():
            raise HTTPException(400, f"the body is empty; {ACCEPTED} is needed")
        self._upload.file.seek(0)
        return self._upload


class _Form:
    """The image is a form's one file, under whatever field; other fields are passed over. Nothing goes to disk."""

    def __init__(self, boundary: bytes | None) -> None:
        if not boundary:
            raise HTTPException(400, f"the form names no boundary; {ACCEPTED} is needed")
        self._files: list[Upload] = []
        self._header, self._value = b"", b""
        self._is_file = self._whole = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begin,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_part_data": self._part_data,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise self._broken(error) from error

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise self._broken(error) from error

    def finish(self) -> Upload:
        """The one file, rewound."""
        if not self._whole:
            raise self._broken("it ends too early")
        if not self._files:
            raise HTTPException(400, "the form has no file; one a request is needed")
        self._files[0].file.seek(0)
        return self._files[0]

    def _broken(self, reason: object) -> HTTPException:
        return HTTPException(400, f"the form cannot be read ({reason}); {ACCEPTED} is needed")

    def _part_begin(self) -> None:
        self._is_file = False

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        name, value = self._header.lower(), self._value
        self._header = self._value = b""
        if name == b"content-disposition":
            _, options = parse_options_header(value)
            if b"filename" in options:
                if self._files:
                    raise HTTPException(400, "the form has several files; one a request is needed")
                self._is_file = True
                self._files.append(Upload(options[b"filename"].decode("utf-8", "replace") or "the image"))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._files[-1].file.write(data[start:end])

    def _end(self) -> None:
        self._whole = True
