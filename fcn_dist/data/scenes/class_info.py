"""What a scenes folder says of its classes: objectInfo150.txt and color150.mat in, names and colours out."""

from pathlib import Path

from fcn_dist.errors import UserError, named
from fcn_dist.labels import LabelRule
from fcn_dist.palette import palette

OBJECT_INFO_NAME = "objectInfo150.txt"
COLOURS_NAME = "color150.mat"
COLUMNS = ("Idx", "Ratio", "Train", "Val", "Name")


def read_classes(scenes_dir: Path) -> tuple[str, ...]:
    """The names of labels 1..N from the objectInfo file, one row a class.

    Raises UserError if there is no such file, or its indices are not 1..N.
    """
    path = _object_info_path(scenes_dir)
    return _indexed(path, _lines(path))


def read_names(path: Path) -> tuple[str, ...]:
    """The names of labels 1..N from an objectInfo file, or from any text file with one name a line.

    Raises UserError if the file cannot be read, or names no class or one twice.
    """
    lines = _lines(path)
    if lines and lines[0].split("\t")[0].strip() == COLUMNS[0]:
        return _indexed(path, lines)
    names = [line.strip() for line in lines if line.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        found = f"{named(twice)} twice" if twice else "no names"
        raise UserError(f"{path} has {found}; the name of a class on each line is needed, each one once")
    LabelRule(len(names))  # refuses what does not fit 8-bit labels
    return tuple(names)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); a UTF-8 text file is needed; write one, or restore it"
        ) from error


def _indexed(path: Path, lines: list[str]) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in line.split("\t")]
        if not any(cells) or cells[0] == COLUMNS[0]:
            continue
        index, name = _parse_row(path, number, cells)
        if index in names:
            raise UserError(f"{path}, line {number}: index {index} stands there twice; give each class its own")
        names[index] = name
    expected = set(range(1, len(names) + 1))
    if not names or set(names) != expected:
        wrong = named([str(i) for i in sorted(set(names) - expected)])
        found = f"{len(names)} classes with indices such as {wrong}" if names else "no classes"
        raise UserError(f"{path} has {found}; indices 1..N, one row a class, are needed; number the rows 1..N")
    LabelRule(len(names))  # refuses what does not fit 8-bit labels
    return tuple(names[index] for index in sorted(names))


def _object_info_path(scenes_dir: Path) -> Path:
    path = scenes_dir / OBJECT_INFO_NAME
    if path.is_file():
        return path
    # A data set of another class count may carry its own number in the name.
    others = sorted(scenes_dir.glob("objectInfo*.txt"))
    if len(others) == 1:
        return others[0]
    found = named([p.name for p in others]) if others else "no objectInfo file"
    raise UserError(
        f"{scenes_dir} has {found}; {OBJECT_INFO_NAME} is needed, tab-separated with the columns "
        f"{', '.join(COLUMNS)}, one row a class; put it there"
    )


def _parse_row(path: Path, number: int, cells: list[str]) -> tuple[int, str]:
    if len(cells) != len(COLUMNS) or not cells[0].isdecimal() or not cells[-1]:
        raise UserError(
            f"{path}, line {number}: {' | '.join(cells)[:80]!r} is no class; {len(COLUMNS)} tab-separated columns "
            f"({', '.join(COLUMNS)}) with a whole number first are needed; correct that line"
        )
    return int(cells[0]), cells[-1]


def read_colours(scenes_dir: Path, num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """RGB of labels 1..N from color150.mat, or a palette if that is absent or for another class count."""
    path = scenes_dir / COLOURS_NAME
    if not path.is_file():
        return palette(num_classes)
    from scipy.io import loadmat

    try:
        colours = loadmat(path)["colors"]
    except Exception as error:  # scipy raises whatever the damage leads it to
        raise UserError(
            f"{path} cannot be read ({error}); a MATLAB v5 file with an Nx3 uint8 array 'colors' is needed; "
            "restore it, or remove it for colours of our own"
        ) from error
    if colours.shape != (num_classes, 3) or colours.dtype.kind not in "ui":
        return palette(num_classes)
    return tuple((int(r), int(g), int(b)) for r, g, b in colours)
