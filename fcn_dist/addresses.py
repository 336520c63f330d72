"""Addresses of files elsewhere, as messages may show them."""

from urllib.parse import urlsplit, urlunsplit


def shown_url(url: str) -> str:
    """`url` as messages show it: without user, password and query, which may be secrets."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition(":")[0] + ":..."
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
