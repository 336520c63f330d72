"""A zip that is damaged or made to do harm is refused, and nothing is ever written outside of its folder."""

import io
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcn_dist.data.download.extract import BadZip, extract
from fcn_dist.errors import UserError

pytestmark = pytest.mark.timeout(60)
GOOD = {"top/a.txt": b"a" * 5000, "top/empty": b"", "top/deep/er/b.bin": bytes(range(256)) * 50}


def made(write: Callable[[ZipFile], object], compression: int = ZIP_DEFLATED) -> bytes:
    """A zip of GOOD's files and what `write` adds."""
    memory = io.BytesIO()
    with ZipFile(memory, "w", compression) as archive:
        for name, data in GOOD.items():
            archive.writestr(name, data)
        write(archive)
    return memory.getvalue()


def member(name: str, kind: int = 0, is_dos: bool = False) -> ZipInfo:
    info = ZipInfo("placeholder")
    # Past the constructor, which makes some names harmless that others may write.
    info.filename = info.orig_filename = name
    info.create_system = 0 if is_dos else 3
    info.external_attr = (kind | 0o644) << 16
    return info


def adding(name: str, kind: int = 0, data: bytes = b"x") -> Callable[[ZipFile], None]:
    return lambda archive: archive.writestr(member(name, kind), data)


def unpacked(data: bytes, folder: Path, max_size: int = 10**6) -> dict[str, bytes]:
    zip_path = folder / "it.zip"
    zip_path.write_bytes(data)
    extract(zip_path, folder / "into", max_size)
    return files_in(folder / "into")


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(data: bytes, folder: Path, max_size: int = 10**6) -> str:
    with pytest.raises(UserError) as caught:
        unpacked(data, folder, max_size)
    assert "it.zip" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("compression", [ZIP_STORED, ZIP_DEFLATED])
def test_plain_files_and_folders_are_unpacked_as_they_are(tmp_path: Path, compression: int) -> None:
    def write(archive: ZipFile) -> None:
        archive.mkdir("top/no files")
        archive.writestr(member("top/ä b.txt"), b"x")
        archive.writestr(member("top/regular", stat.S_IFREG), b"x")
        archive.writestr(member("top/dos", is_dos=True), b"x")

    found = unpacked(made(write, compression), tmp_path)
    assert found == {**GOOD, "top/ä b.txt": b"x", "top/regular": b"x", "top/dos": b"x"}
    assert (tmp_path / "into" / "top" / "no files").is_dir()


def test_modes_of_the_zip_are_not_taken_over(tmp_path: Path) -> None:
    info = member("tool")
    info.external_attr = (stat.S_IFREG | stat.S_ISUID | 0o777) << 16
    unpacked(made(lambda archive: archive.writestr(info, b"x")), tmp_path)
    assert not (tmp_path / "into" / "tool").stat().st_mode & (stat.S_ISUID | 0o111)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("../x", "leads elsewhere"),
        ("top/../../x", "leads elsewhere"),
        ("top/..", "leads elsewhere"),
        ("./x", "leads elsewhere"),
        ("top//x", "leads elsewhere"),
        ("", "leads elsewhere"),
        ("/tmp/x", "absolute"),
        ("//host/x", "absolute"),
        ("C:/x", "absolute"),
        ("c:x", "absolute"),
        ("..\\x", "characters"),
        ("top\\x", "characters"),
        ("top/x\0.jpg", "characters"),
        ("top/x\n", "characters"),
        ("top/\x1b[2J", "characters"),
        ("top/" + "x" * 256, "too long"),
        ("top/" + "ä" * 128, "too long"),
        ("x/" * 513 + "x", "too long"),
        ("top/a.txt", "twice"),
        ("top/a.txt/x", "both a file and a folder"),
        ("top/deep", "both a file and a folder"),
        ("top/a.txt/", "both a file and a folder"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_no_member_may_have_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, word: str
) -> None:
    data = made(adding(name))
    (tmp_path / "within").mkdir()
    message = refusal(data, tmp_path / "within")
    assert word in message and len(message) < 500
    assert "\n" not in message and "\x1b" not in message
    assert [path.name for path in tmp_path.rglob("*")] == ["within", "it.zip"]


@pytest.mark.parametrize(
    ("kind", "word"),
    [(stat.S_IFLNK, "is a link"), (stat.S_IFIFO, "neither"), (stat.S_IFCHR, "neither"), (stat.S_IFDIR, "neither")],
)
def test_links_and_special_files_are_refused(tmp_path: Path, kind: int, word: str) -> None:
    assert word in refusal(made(adding("top/link", kind, b"/etc/passwd")), tmp_path)
    assert not (tmp_path / "into").exists()


def patched(data: bytes, offset_in_central: int, form: str, value: int, offset_in_local: int) -> bytes:
    """`data` with one field of its last member changed in both of the member's headers."""
    changed = bytearray(data)
    struct.pack_into(form, changed, changed.rindex(b"PK\1\2") + offset_in_central, value)
    struct.pack_into(form, changed, changed.rindex(b"PK\3\4") + offset_in_local, value)
    return bytes(changed)


@pytest.mark.parametrize("flag", [0x1, 0x41])
def test_an_encrypted_member_is_refused(tmp_path: Path, flag: int) -> None:
    assert "is encrypted" in refusal(patched(made(adding("top/x")), 8, "<H", flag, 6), tmp_path)


def test_only_methods_that_inflate_piece_by_piece_are_read(tmp_path: Path) -> None:
    assert "method 12" in refusal(made(adding("top/x"), ZIP_BZIP2), tmp_path)
    assert "method 99" in refusal(patched(made(adding("top/x")), 10, "<H", 99, 8), tmp_path)


def test_a_bomb_that_states_its_size_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    bomb = made(lambda archive: archive.writestr("zeros", bytes(3 * 10**6)))
    assert len(bomb) < 20_000
    message = refusal(bomb, tmp_path)
    total = 3 * 10**6 + sum(map(len, GOOD.values()))
    assert f"{total:,} bytes; at most 1,000,000" in message and "--max-size" in message
    assert not (tmp_path / "into").exists()
    assert len(unpacked(bomb, tmp_path, total)["zeros"]) == 3 * 10**6


@pytest.mark.parametrize("has_fitting_crc", [False, True])
def test_a_bomb_that_states_too_small_a_size_ends_there(tmp_path: Path, has_fitting_crc: bool) -> None:
    bomb = made(lambda archive: archive.writestr(member("zeros"), bytes(3 * 10**6), ZIP_DEFLATED))
    lying = patched(bomb, 24, "<I", 10, 22)
    if has_fitting_crc:
        lying = patched(lying, 16, "<I", zlib.crc32(bytes(10)), 14)
        assert len(unpacked(lying, tmp_path)["zeros"]) == 10
    else:
        refusal(lying, tmp_path)
        assert (tmp_path / "into" / "zeros").stat().st_size <= 10


@pytest.mark.parametrize("compression", [ZIP_STORED, ZIP_DEFLATED])
def test_a_member_that_is_smaller_than_stated_is_refused(tmp_path: Path, compression: int) -> None:
    data = made(lambda archive: archive.writestr(member("few"), b"few bytes" * 9, compression))
    assert "damaged" in refusal(patched(data, 24, "<I", 500, 22), tmp_path)


def test_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcn_dist.data.download.extract.MAX_MEMBERS", 3)
    assert "has 4 members" in refusal(made(adding("top/x")), tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_what_is_cut_off_is_no_zip(tmp_path: Path, keep: float) -> None:
    data = made(adding("top/x"))
    cut = data[: keep if isinstance(keep, int) else int(len(data) * keep)]
    message = refusal(cut, tmp_path)
    assert "no zip file, or a damaged one" in message and repr(cut[:16]) in message


def test_a_flipped_byte_is_found_by_its_crc(tmp_path: Path) -> None:
    data = bytearray(made(adding("top/x"), ZIP_STORED))
    data[data.index(b"aaaa") + 2] ^= 1
    assert "Bad CRC-32" in refusal(bytes(data), tmp_path)


def test_a_name_that_is_not_in_its_code_is_damage(tmp_path: Path) -> None:
    data = made(adding("top/ä")).replace("ä".encode(), b"\xc3\xc3")
    assert "damaged" in refusal(data, tmp_path)


@given(st.data())
def test_damage_anywhere_is_a_message_or_does_no_harm(data: st.DataObject) -> None:
    damaged = bytearray(made(adding("top/x")))
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    with TemporaryDirectory() as folder:
        try:
            unpacked(bytes(damaged), Path(folder))
        except BadZip:
            pass
        except UserError as error:
            assert "--max-size" in str(error)
        assert {path.name for path in Path(folder).iterdir()} <= {"it.zip", "into"}


PARTS = st.one_of(
    st.sampled_from(["..", ".", "", "top", "a.txt", "C:", "\\", "..\\..", "~", "\0"]), st.text(max_size=4)
)


@given(st.lists(PARTS, min_size=1, max_size=5))
def test_no_name_leads_out_of_the_folder(parts: list[str]) -> None:
    name = "/".join(parts)
    try:
        data = made(adding(name))
    except UnicodeEncodeError:
        return
    with TemporaryDirectory() as folder:
        within = Path(folder, "one", "two")
        within.mkdir(parents=True)
        try:
            found = unpacked(data, within)
        except BadZip:
            found = None
        outside = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")}
        assert not {path for path in outside if not path.startswith("one/two/into/")} - {
            "one",
            "one/two",
            "one/two/it.zip",
            "one/two/into",
        }
        assert found is None or name.endswith("/") or found[name] == b"x"
