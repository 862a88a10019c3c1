"""lab.py -> a Jupyter notebook, by jupytext: `llmlab lab notebook NAME`. The script stays the source; nothing is executed."""

from __future__ import annotations

from pathlib import Path

from labs.frame import declared
from pipelines.errors import ConfigError


def write(name: str, to: Path) -> Path:
    """Write a lab as a notebook and return its path.

    Args:
        name: of the lab.
        to: a file that ends in .ipynb; its folder is made.

    Raises:
        UnknownName: there is no such lab.
        ConfigError: jupytext is not installed, or the path is no notebook's or cannot be written.
    """
    lab = declared.find(name)
    if to.suffix != ".ipynb":
        raise ConfigError(f"-o {to}", "a file that ends in .ipynb", f"-o {name}.ipynb")
    try:
        import jupytext
    except ModuleNotFoundError:
        raise ConfigError("jupytext is not installed", "jupytext in .venv", "make setup-labs") from None
    notebook = jupytext.read(lab.folder / declared.SCRIPT, fmt="py:percent")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        jupytext.write(notebook, to, fmt="ipynb")
    except OSError as problem:
        raise ConfigError(f"{to} cannot be written: {problem.strerror}", "a path that can be written") from None
    return to
