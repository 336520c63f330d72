"""Files of launch/ by their bare names: of the checkout, or as pip has installed them beside the package."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

CHECKOUT = Path(__file__).parents[1] / "launch"
INSTALLED = "share/fcn-dist"  # as setup.cfg says


def shipped(name: Path, folder: str, suffix: str) -> Path:
    """What `name`, such as "camvid", means: a file of that path, or `name` with `suffix` in a folder of launch/.

    Gives `name` back if it is neither.
    """
    if name.exists() or name.suffix or len(name.parts) != 1:
        return name
    wanted = f"{folder}/{name}{suffix}"
    if (CHECKOUT / wanted).exists():
        return CHECKOUT / wanted
    try:
        installed = files("fcn-dist") or []
    except PackageNotFoundError:
        return name
    return next((Path(str(one.locate())) for one in installed if str(one).endswith(f"{INSTALLED}/{wanted}")), name)
