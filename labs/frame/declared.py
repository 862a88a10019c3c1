"""A lab: a folder below labs/ with lab.yaml (what it claims and needs), lab.py (cells) and README.md (why, what next).

Adding a lab is adding such a folder; nothing else names it. `llmlab labs` lists them. Nothing here measures.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path

from pydantic import Field

from labs.frame.needs import NeedName
from pipelines.config import ROOT, Config, Named, load, unknown
from pipelines.errors import ConfigError

FOLDER = ROOT / "labs"
DECLARED, SCRIPT, ABOUT = "lab.yaml", "lab.py", "README.md"


class Claim(Config):
    """One statement that a lab puts to the test."""

    text: str = Field(min_length=1, description="in our words, as something that can turn out to be false")
    document: str = Field(min_length=1, description="where the document says it, or what it follows from there")


class Lab(Named):
    """What lab.yaml says; `name` is the folder's."""

    title: str = Field(min_length=1)
    claims: dict[str, Claim] = Field(min_length=1, description="by the key under which lab.py gives its verdict")
    minutes: float = Field(gt=0, description="of the full form on two cores")
    needs: list[NeedName] = Field(default=[], description="what must be here beside the base install")

    @property
    def folder(self) -> Path:
        """Return the lab's folder."""
        return FOLDER / self.name

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of what a verdict is of: the claims, and lab.py but for its comments and its form.

        Raises:
            ConfigError: lab.py is no Python.
        """
        try:
            script = ast.dump(ast.parse((self.folder / SCRIPT).read_text(encoding="utf-8")))
        except (SyntaxError, ValueError) as error:
            raise ConfigError(f"labs/{self.name}/{SCRIPT} is no Python: {error}", "cells of Python",
                              f"edit labs/{self.name}/{SCRIPT}") from None  # fmt: skip
        claims = {key: claim.model_dump() for key, claim in self.claims.items()}
        return hashlib.sha256(json.dumps([script, claims]).encode()).hexdigest()


def names() -> list[str]:
    """Return the names of all labs, sorted."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{DECLARED}"))


def find(name: str) -> Lab:
    """Return the lab called `name`.

    Raises:
        UnknownName: with the valid names and the nearest one.
        ConfigError: lab.yaml does not fit, says another name than the folder's, or the folder lacks a file.
    """
    if name not in names():
        raise unknown("lab", name, names())
    folder = FOLDER / name
    lab = load(folder / DECLARED, Lab)
    if lab.name != name:
        raise ConfigError(f"labs/{name}/{DECLARED} says name: {lab.name}", f"name: {name}", f"edit labs/{name}/{DECLARED}")
    missing = [file for file in (SCRIPT, ABOUT) if not (folder / file).is_file()]
    if missing:
        raise ConfigError(f"labs/{name} has no {' and no '.join(missing)}", f"{DECLARED}, {SCRIPT} and {ABOUT}")
    return lab


def all_labs() -> list[Lab]:
    """Return every lab, by name."""
    return [find(name) for name in names()]
