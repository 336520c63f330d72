"""The trees in README and docs/code.md name every room, module and script of the checkout, and nothing else."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DESCRIPTIONS = 30  # columns from which on a line has only words about what stands above


def tree(page: str) -> dict[str, tuple[set[str], str]]:
    """By folder: the names that stand in it, and what is said of it."""
    text = (ROOT / page).read_text()
    section = text[text.index("\n    fcn_dist/\n") + 1 :].split("\n\n")[0]
    found: dict[str, tuple[set[str], str]] = {}
    above: list[tuple[int, str]] = []
    for line in section.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent >= DESCRIPTIONS:
            folder = above[-1][1]
            found[folder] = (found[folder][0], f"{found[folder][1]} {line.strip()}")
            continue
        names, _, words = re.sub(r" {2,}", "\t", line.strip()).partition("\t")
        while above and above[-1][0] >= indent:
            above.pop()
        for name in filter(None, (name.strip() for name in names.split(","))):
            if above:
                found[above[-1][1]][0].add(name)
            if name.endswith("/"):
                folder = f"{above[-1][1] if above else ''}{name}"
                found[folder] = (set(), words)
        if names.split(",")[0].endswith("/"):
            above.append((indent, folder))
    return found


CODE, TREE = tree("docs/code.md"), tree("README.md")


def there(folder: str) -> set[str]:
    """Modules and folders of the package in a folder, as the tree would name them."""
    paths = (ROOT / folder).iterdir()
    return {
        f"{path.name}/" if path.is_dir() else path.stem
        for path in paths
        if (path.is_dir() and path.name != "__pycache__") or (path.suffix == ".py" and not path.stem.startswith("__"))
    }


def test_a_folder_whose_modules_are_named_has_these_and_no_others() -> None:
    named = {folder: names for folder, (names, _) in CODE.items()}
    assert {"fcn_dist/", "fcn_dist/data/", "fcn_dist/training/"} <= set(named)
    for folder, names in named.items():
        if names:
            assert names == there(folder), folder


def test_every_room_stands_in_it() -> None:
    rooms = {f"fcn_dist/{path.parent.name}/" for path in (ROOT / "fcn_dist").glob("*/__init__.py")}
    for named in (CODE, TREE):
        assert rooms == {folder for folder in named if re.fullmatch(r"fcn_dist/\w+/", folder)}


def test_the_scripts_are_those_of_their_folders() -> None:
    for folder in ("launch/", "shards/"):
        words = {word.removesuffix(".sh") for word in re.findall(r"[\w.]+", TREE[folder][1])}
        scripts = {path.stem for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".sh")} - {"environment"}
        assert words == scripts, folder


def test_the_folders_at_the_top_are_there() -> None:
    tops = {folder for folder in TREE if folder.count("/") == 1}
    kept = {
        f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.*")) and path.name[0] != "."
    }
    assert {"fcn_dist/", "launch/", "shards/", "tests/", "benchmarks/", "docs/"} == tops <= kept
    assert all((ROOT / "launch" / name).exists() for name in TREE["launch/"][0])


def test_every_page_stands_in_the_table_of_pages() -> None:
    readme = (ROOT / "README.md").read_text()
    pages = re.findall(r"\[(\w+)\]\(docs/(\w+)\.md\)", readme[readme.index("## Documentation") :].split("\n## ")[0])
    assert all(name == page for name, page in pages)
    assert sorted(page for _, page in pages) == sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
