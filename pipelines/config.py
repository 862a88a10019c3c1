"""YAML file -> frozen, typed object, with every problem of the file in one message.

No defaults live here and nothing is read from the environment: a value crosses one boundary, from the file to
the object to the function that uses it. Overrides come as `a.b=c` and are parsed as YAML, then checked like the rest.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.errors import ConfigError, UnknownName

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"


class Config(BaseModel):
    """Base of every configuration object: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text, since it has no point; everybody means a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


class Named(Config):
    """Base of the entries of a catalogue, each in a file that is called as it is."""

    name: str


C = TypeVar("C", bound=Config)
E = TypeVar("E", bound=Named)


def load(path: Path, kind: type[C], overrides: Sequence[str] = ()) -> C:
    """Read one YAML file into `kind`.

    A file that says `like: NAME` is that file of its folder with its own fields put over it.

    Args:
        path: the YAML file.
        kind: the Config class that describes it.
        overrides: strings `a.b=c`; `c` is parsed as YAML, so `3`, `true` and `[a, b]` keep their types.

    Raises:
        ConfigError: the file is missing, is not a YAML mapping, or does not fit `kind`; lists all problems.
    """
    tree = _with_like(path)
    for override in overrides:
        _apply(tree, override)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        change = f"edit {_short(path)}" + (f", or change --set {' '.join(overrides)}" if overrides else "")
        raise ConfigError(_explain(path, error), f"the fields of {kind.__name__}", change) from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; `ConfigError` if the file is missing, broken, or holds something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{_short(path)} does not exist", "a YAML file", f"ls {_short(path.parent)}") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{_short(path)} is not a UTF-8 text file ({error})", "YAML text") from None
    try:
        tree = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{_short(path)} is not valid YAML: {error}", "YAML", f"edit {_short(path)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{_short(path)} holds {type(tree).__name__}", "a mapping of names to values")
    return tree


def named(folder: str, name: str) -> Path:
    """Return `configs/<folder>/<name>.yaml`.

    Raises:
        UnknownName: with the valid names and the nearest one.
    """
    valid = names(folder)
    if name not in valid:
        raise unknown(folder.rstrip("s"), name, valid)
    return CONFIGS / folder / f"{name}.yaml"


def load_entry(folder: str, name: str, kind: type[E]) -> E:
    """Read the entry of a catalogue, `configs/<folder>/<name>.yaml`.

    Raises:
        UnknownName: with the valid names and the nearest one.
        ConfigError: the file does not fit `kind`, or says another name than its own.
    """
    found = load(named(folder, name), kind)
    if found.name != name:
        raise ConfigError(f"configs/{folder}/{name}.yaml says name: {found.name}", f"name: {name}")
    return found


def names(folder: str) -> list[str]:
    """Return the names of all configurations in `configs/<folder>`, sorted."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


def unknown(noun: str, name: str, valid: Iterable[str]) -> UnknownName:
    """Build the error for a name that does not exist: the valid names and the nearest one."""
    choices = list(valid)
    nearest = difflib.get_close_matches(name.lower(), choices, n=1, cutoff=0.0)
    hint = f"did you mean {nearest[0]}?" if nearest else ""
    return UnknownName(f"there is no {noun} named {name!r}", "one of " + (", ".join(choices) or "(none yet)"), hint)


def _with_like(path: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a file's mapping, over that of the file it says it is like."""
    tree = read_mapping(path)
    like = tree.get("like")
    if like is None:
        return tree
    if not isinstance(like, str) or like in (*seen, path.stem) or like not in (p.stem for p in path.parent.glob("*.yaml")):
        raise ConfigError(
            f"{_short(path)} is like {like!r}", "the name of another file in its folder", f"ls {_short(path.parent)}"
        )
    return _over(_with_like(path.with_name(f"{like}.yaml"), (*seen, path.stem)), tree)


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Put one mapping over another: groups are put together, values and lists replaced."""
    both = {key: _over(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
            for key, value in above.items()}  # fmt: skip
    return below | both


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} has no '='", "--set name.of.field=value")
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a group of fields")
    try:
        tree[leaf] = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {override!r} is not valid YAML: {error}") from None


def _explain(path: Path, error: ValidationError) -> str:
    problems = [f"  {'.'.join(map(str, e['loc'])) or '(file)'}: {_reason(e)}" for e in error.errors()]
    return f"{_short(path)} has {len(problems)} problem{'s' * (len(problems) > 1)}:\n" + "\n".join(problems)


def _reason(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key"
    if error["type"] == "missing":
        return "missing"
    return f"{error['msg']} (came: {error['input']!r})"


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
