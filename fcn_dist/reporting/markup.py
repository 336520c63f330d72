"""HTML in which nothing that comes from a run is taken for markup: text is escaped unless it was made here."""

from collections.abc import Sequence
from html import escape

EMPTY = {"img", "meta"}  # elements without an end


class Html(str):
    """Text that is markup already."""


Part = str | None  # None: nothing


def join(parts: Sequence[Part]) -> Html:
    """One after the other, each escaped unless it is markup."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts if part is not None))


def element(name: str, /, *parts: Part, **attributes: str | None) -> Html:
    """<name attributes>parts</name>; `class_` is the attribute class, and None leaves one out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>" if name in EMPTY else f"<{name}{written}>{join(parts)}</{name}>")


def table(head: Sequence[Part], rows: Sequence[Sequence[Part]], class_: str | None = None) -> Html:
    """The first cell of a row is its head. Wide tables scroll in their own frame."""
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    columns = element("tr", *(element("th", cell, scope="col") for cell in head))
    parts = [element("thead", columns)] if any(head) else []
    return element("div", element("table", *parts, element("tbody", *body), class_=class_), class_="wide", tabindex="0")


def figure(title: str, content: Part, caption: Part = None, class_: str | None = None) -> Html:
    """A chart or picture with what it is above, and what there is to say of it below."""
    below = element("figcaption", caption) if caption else None
    return element("figure", element("h3", title), content, below, class_=class_)


def note(*parts: Part) -> Html:
    """A paragraph about what is not there."""
    return element("p", *parts, class_="note")
