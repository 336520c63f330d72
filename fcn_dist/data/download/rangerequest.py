"""An address and an offset in; what its server has from there out, or why it has not.

Statuses and headers are those of RFC 9110 (13.1.5 If-Range, 14 Range requests, 15 status codes).
"""

import re
import ssl
import time
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse, InvalidURL
from urllib.parse import urljoin, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

import fcn_dist
from fcn_dist.errors import UserError

MAX_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429)  # client errors that another try may not meet; all of 5xx are so, too
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")


class Trouble(Exception):
    """What another try may mend."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after  # seconds that the server asks for


class Changed(Trouble):
    """The server has another file than the one that the offset belongs to."""


@dataclass(frozen=True)
class Origin:
    """One version of a file, as its server tells it from others."""

    url: str
    etag: str | None
    last_modified: str | None
    size: int | None  # None: the server does not say

    @property
    def validator(self) -> str | None:
        """What If-Range may hold, which no weak ETag may."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def differs(self, other: "Origin") -> bool:
        """Whether something that both state is not the same."""
        fields = ("etag", "last_modified", "size")
        stated = ((getattr(self, name), getattr(other, name)) for name in fields)
        return any(mine is not None and theirs is not None and mine != theirs for mine, theirs in stated)


@dataclass(frozen=True)
class Answer:
    """The bytes of a file from `start` on."""

    origin: Origin
    start: int
    response: HTTPResponse

    def read(self, most: int) -> bytes:
        """What has come, at most `most` bytes; empty at the end. Raises Trouble if the connection breaks."""
        try:
            # Not read(): what has come before a connection breaks would be lost with it.
            return self.response.read1(most)
        except (OSError, HTTPException) as error:
            raise Trouble(_told(error)) from error


def check_url(url: str) -> None:
    """Raise UserError unless `url` is an address that may be fetched."""
    try:
        parts = urlsplit(url)
        scheme, host, _ = parts.scheme, parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{url!r} is no address ({error}); one such as https://host/file.zip is needed") from error
    if scheme not in ("http", "https") or not host:
        raise UserError(f"{url!r} is no address of http or https; one such as https://host/file.zip is needed")
    if not re.fullmatch("[!-~]+", url):
        raise UserError(f"{url!r} has characters that no address may have; write them as %XX")


def ask(url: str, offset: int, known: Origin | None, timeout: float) -> Answer:
    """Ask for the file from `offset` on, if it is still `known`; the answer may begin at 0 all the same.

    Raises Trouble, Changed, or UserError for what no other try mends.
    """
    headers = {"User-Agent": f"fcn-dist/{fcn_dist.__version__}", "Accept-Encoding": "identity"}
    if offset and known:
        headers["Range"] = f"bytes={offset}-"
        if known.validator:
            headers["If-Range"] = known.validator
    response = _follow(url, headers, timeout)
    try:
        return _understood(url, offset, known, response)
    except BaseException:
        response.close()
        raise


def _follow(url: str, headers: dict[str, str], timeout: float) -> HTTPResponse:
    place = url
    for _ in range(MAX_REDIRECTS + 1):
        response = _open(place, headers, timeout)
        if response.status not in _REDIRECTS:
            return response
        response.close()
        location = response.headers.get("Location", "")
        try:
            place = urljoin(place, location)
            check_url(place)
        except (ValueError, UserError) as error:
            raise UserError(
                f"{url} redirects to {location!r}, which is no address of http or https; give the file's own with --url"
            ) from error
    raise UserError(f"{url} redirects more than {MAX_REDIRECTS} times; give the file's own address with --url")


def _open(place: str, headers: dict[str, str], timeout: float) -> HTTPResponse:
    # Proxies as the environment says; no handler for files or ftp, nor one that follows redirects by itself.
    opener = OpenerDirector()
    for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler()):
        opener.add_handler(handler)
    try:
        response = opener.open(Request(place, headers=headers), timeout=timeout)
    except InvalidURL as error:
        raise UserError(f"{place!r} is no address ({error}); one such as https://host/file.zip is needed") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise UserError(
                f"{place} has no certificate that this machine trusts ({reason.verify_message}); correct the address, "
                "or install the certificate of who signed it"
            ) from error
        raise Trouble(_told(reason)) from error
    assert isinstance(response, HTTPResponse)
    return response


def _told(error: object) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _understood(url: str, offset: int, known: Origin | None, response: HTTPResponse) -> Answer:
    status, headers = response.status, response.headers
    start, size = _content_range(headers.get("Content-Range", ""))
    told = Origin(url, headers.get("ETag"), headers.get("Last-Modified"), response.length if status == 200 else size)
    if status in (200, 206):
        _check_form(url, response)
    if status == 200:
        return Answer(told, 0, response)
    if status in (206, 416) and known and offset:
        whole = status == 416 and size == offset
        if known.differs(told) or not (whole or (status == 206 and start == offset)):
            raise Changed(f"the server no longer has the file that the first {offset:,} bytes are of")
        if told.size is None and response.length is not None and status == 206:
            size = offset + response.length
        return Answer(replace(known, size=known.size or size), offset, response)
    if status in _PASSING or status >= 500:
        raise Trouble(f"HTTP status {status}", _retry_after(headers.get("Retry-After", "")))
    raise UserError(f"{url} answers with HTTP status {status}; 200 and the file are needed; check the address")


def _content_range(text: str) -> tuple[int | None, int | None]:
    """The first byte and the size of the whole file, each None where the header does not say."""
    match = _CONTENT_RANGE.fullmatch(text.strip())
    if not match:
        return None, None
    start, size = (int(cell) if cell and cell != "*" else None for cell in match.groups())
    return start, size


def _check_form(url: str, response: HTTPResponse) -> None:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise UserError(f"{url} is sent as {encoding!r}, unasked; the file as it is is needed; give another address")
    if response.headers.get_content_type() == "text/html":
        # A portal's log-in page must not replace the part of a file that is here.
        raise UserError(
            f"{url} is a web page; a zip file is needed; check the address, and that no log-in is asked for"
        )


def _retry_after(text: str) -> float | None:
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
