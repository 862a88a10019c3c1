"""The shape of the project: who imports whom, that every module imports, and what the README shows."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipelines", "serving", "monitoring", "labs")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
LABS = {p.parent / "lab.py" for p in (ROOT / "labs").glob("*/lab.yaml")}  # scripts of cells, which measure when they are imported
MODULES = [p for p in FILES if p not in LABS]
LEAVES = {"pipelines.config", "pipelines.errors", "monitoring.metrics"}
ALLOWED = {
    "pipelines": {"pipelines", "monitoring.metrics"},
    "serving": {"pipelines", "serving", "monitoring.metrics", "monitoring.hardware", "monitoring.workers"},
    "monitoring": {"monitoring"},
    "labs": {"pipelines", "serving", "monitoring", "labs"},
}
HEAVY = (
    "torch", "transformers", "peft", "faiss", "matplotlib", "langchain_core", "llama_index", "xllamacpp", "bitsandbytes",
    "datasets", "qdrant_client", "pymilvus", "psycopg", "weaviate", "pinecone", "ray",
)  # fmt: skip


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    for name in imports_of(path):
        assert any(name == a or name.startswith(a + ".") or (a.startswith(name + ".")) for a in ALLOWED[own]), (
            f"{path} imports {name}"
        )


def test_leaves_import_only_leaves() -> None:
    for leaf in LEAVES:
        for name in imports_of(ROOT / (leaf.replace(".", "/") + ".py")):
            assert any(name == other or name.startswith(other + ".") for other in LEAVES), f"{leaf} imports {name}"


def test_every_module_imports_and_none_is_heavy() -> None:
    names = [module_name(p) for p in MODULES]
    script = "import importlib, sys\n" + f"for name in {names!r}: importlib.import_module(name)\n"
    script += f"print([h for h in {HEAVY!r} if h in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_module_says_what_it_is() -> None:
    for path in MODULES:
        assert importlib.import_module(module_name(path)).__doc__, path


def test_nothing_is_unpickled_and_no_remote_code_is_trusted() -> None:
    for path in FILES:
        text = path.read_text()
        for bad in (
            "pickle.load",
            "torch.load(",
            "joblib.load",
            "trust_remote_code=True",
            "allow_dangerous_deserialization=True",
        ):
            assert bad not in text, f"{path}: {bad}"


@pytest.mark.parametrize("lock", sorted((ROOT / "requirements").glob("*.lock")), ids=lambda path: path.name)
def test_every_package_is_pinned(lock: Path) -> None:
    """One tested set of versions for each environment; a range would bring another one on another day."""
    lines = [line.split("#")[0].strip() for line in lock.read_text().splitlines()]
    pins = [line for line in lines if line]
    assert pins and all(re.fullmatch(r"[\w.-]+(\[\w,-]+\])?==[\w.+!-]+", pin) for pin in pins), pins


def test_everything_asked_for_is_in_the_lock() -> None:
    locked = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "requirements" / "base.lock").read_text().splitlines()
    }
    for line in (ROOT / "requirements" / "base.in").read_text().splitlines():
        if name := re.match(r"[\w.-]+", line):
            assert name[0].lower() in locked, line


@pytest.mark.parametrize(
    ("library", "others"),
    [
        (
            "langchain",
            {"labs.chains.langchain_rag", "labs.bench.rag_langchain", "serving.engines.provider", "serving.engines.provider_api"},
        ),
        ("llama_index", {"labs.chains.llamaindex_rag"}),
    ],
)
def test_chains_are_behind_one_door(library: str, others: set[str]) -> None:
    """Their modules move between releases; only the adapters of our retriever, an example of each, the
    bench and the engine for remote models know them.
    """
    users = {module_name(path) for path in FILES if re.search(rf"^\s*(from|import) {library}", path.read_text(), re.M)}
    assert users == {"pipelines.rag.adapters", *others}
