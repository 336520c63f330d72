"""YAML and `--set KEY=VALUE` in, a recipe out; what is wrong is named with its key and place."""

import copy
import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fcn_dist.config import Recipe
from fcn_dist.errors import UserError
from fcn_dist.shipped import shipped


def load_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file (defaults if None) with `KEY=VALUE` overrides applied, later ones winning.

    A bare name, such as `camvid`, is one of launch/recipes.

    Raises UserError naming the key that is unknown or has a value of the wrong kind, and where it stands.
    """
    import yaml

    if path is None:
        return recipe_from_dict({}, "the recipe", overrides)
    path = shipped(path, "recipes", ".yaml")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(
            f"recipe {path} cannot be read ({error.strerror}); give --recipe a YAML file, or "
            "the name of one in launch/recipes"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not YAML: {error}") from error
    return recipe_from_dict(tree, str(path), overrides)


def recipe_from_dict(tree: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Build and check a recipe; `where` names its origin in errors, the rest as `load_recipe`."""
    from jsonargparse import ArgumentParser

    _check_keys(tree, Recipe, "", where)
    tree = copy.deepcopy(tree)
    for override in overrides:
        _override(tree, override)
    schedule = tree.get("schedule", {})
    if schedule.get("epochs") is None and schedule.get("steps") is None:
        tree = {**tree, "schedule": {**schedule, "steps": 1000}}
    elif "steps" not in schedule:
        # jsonargparse fills in the default of the whole section, which counts in steps.
        tree = {**tree, "schedule": {**schedule, "steps": None}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, None)
    try:
        values = parser.instantiate(parser.parse_object(tree))
    except Exception as error:  # jsonargparse raises several kinds, of which argparse's is only the commonest
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(_wrong_kind(tree, str(error), where, overrides)) from error
    return Recipe(**{f.name: values[f.name] for f in fields(Recipe)})


def _wrong_kind(tree: dict[str, Any], message: str, where: str, overrides: Sequence[str]) -> str:
    """What jsonargparse says of a value, in our words: which, what it is and what is needed."""
    found = re.match(r'Parser key "([\w.]+)"', message)
    if not found:
        return f"{where}: {' '.join(message.split())}"
    key = found[1]
    value: Any = tree
    kind: Any = Recipe
    for name in key.split("."):
        value, kind = value[name], {f.name: f.type for f in fields(kind)}[name]
    names = get_args(kind) if get_origin(kind) is Literal else ()
    needed = f"one of {', '.join(names)}" if names else re.sub(r"<class '(\w+)'>", r"\1", str(kind))
    place = next((f"--set {one}" for one in reversed(overrides) if one.partition("=")[0].strip() == key), where)
    return f"{place}: {key} is {value!r}; {needed} is needed; change it"


def _override(tree: dict[str, Any], override: str) -> None:
    import yaml

    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override} has no '='; KEY=VALUE is needed, such as --set checkpoint.every=500")
    try:
        _set(tree, key.strip().split("."), yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML: {error}") from error
    _check_keys(tree, Recipe, "", f"--set {override}")


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    *sections, name = path
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {'.'.join(path)}: {section!r} is a value, not a section; check the key")
    tree[name] = value


def _check_keys(tree: Any, section: Any, prefix: str, where: str) -> None:
    """Raise UserError for the first key of `tree` that dataclass `section` does not have, or has, but not as null.

    jsonargparse takes null for a value of any type.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{where}: {prefix.rstrip('.') or 'the recipe'} is {tree!r}; a section of keys is needed")
    known = {f.name: f.type for f in fields(section)}
    for key, value in tree.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known are {', '.join(known)}"
            raise UserError(f"{where}: unknown recipe key {prefix}{key}; {hint}")
        if is_dataclass(known[key]):
            _check_keys(value, known[key], f"{prefix}{key}.", where)
        elif value is None and type(None) not in get_args(known[key]):
            raise UserError(f"{where}: {prefix}{key} is null; a value is needed; leave it out for its default")
