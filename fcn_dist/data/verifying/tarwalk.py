"""A tar file in; its members as any reader comes to them out, at the cost of little memory whatever the file holds."""

import tarfile
from io import FileIO
from pathlib import Path
from typing import NamedTuple

_LONGEST_READ = 2**20  # bytes of one header; extended ones state their own length


class Member(NamedTuple):
    """One member of a tar."""

    name: str
    offset: int  # of the payload
    size: int
    type: bytes


def walk(path: Path, at_most: int) -> tuple[list[Member], str]:
    """The members in their order, and why the walk ended early, if it did; `at_most` so many are gone to."""
    members: list[Member] = []
    try:
        with _Frugal(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if len(members) == at_most:  # a size below zero would even lead in circles
                    return members, f"has more than {at_most} members, which are more than the index lists"
                members.append(Member(info.name, info.offset_data, info.size, info.type))
    except Exception as error:  # damage leads tarfile to whatever it raises, recursion errors among them
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        return members, f"is no whole tar file: after {len(members)} members: {detail}"
    return members, ""


class _Frugal(FileIO):
    """A file that gives no more at once than a header should take."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises ReadError if too much is asked for."""
        if size is None or not 0 <= size <= _LONGEST_READ:
            raise tarfile.ReadError(f"a header states that it is {size} bytes long")
        return super().read(size) or b""
