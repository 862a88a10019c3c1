"""The lab frame through the command line: labs are folders, each claim gets a verdict, the page of verdicts is generated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from labs.cli import app
from labs.frame import collected, declared, needs, session, verdict
from labs.frame.verdict import Result
from pipelines.errors import ConfigError, LabError, RunIncomplete, UnknownName

ROOT = Path(__file__).parents[2]
CAPSTONE = "capstone-rag"  # the longest lab; make test-all takes the same way with the demo
CLAIMS = {
    "sum": {"text": "Two and two are four", "document": "nowhere"},
    "paid": {"text": "A model | of somebody else agrees", "document": "nowhere"},
}
DECLARATION = {"name": "two-and-two", "title": "Two and two", "minutes": 0.1, "claims": CLAIMS}
SCRIPT = """# %% [markdown]
# # Two and two

# %%
from matplotlib.figure import Figure

from labs.frame.session import begin
from labs.frame.verdict import judged, not_here

lab = begin("two-and-two")
numbers = lab.pick([2, 2], [2, 3])

# %%
total = sum(numbers)
lab.conclude({"paid": not_here("no key", "ask it"), "sum": judged(total == 4, f"{total}", "adding", total=total)}, Figure())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of labs with one lab in it, which is all that it takes to add one."""
    made = tmp_path / "labs" / "two-and-two"
    made.mkdir(parents=True)
    (made / "lab.yaml").write_text(as_yaml(DECLARATION))
    (made / "lab.py").write_text(SCRIPT)
    (made / "README.md").write_text("# Two and two\n")
    monkeypatch.setattr(declared, "FOLDER", made.parent)
    monkeypatch.setattr(session, "REPORTS", tmp_path / "reports")
    return made


def as_yaml(declaration: dict[str, Any]) -> str:
    return yaml.safe_dump(declaration, sort_keys=False)


def llmlab(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_adding_a_folder_adds_a_lab(folder: Path) -> None:
    assert "two-and-two" in llmlab("labs").stdout
    done = llmlab("lab", "run", "two-and-two")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert list(said["verdicts"]) == ["sum", "paid"] and said["form"] == "full"
    assert said["verdicts"]["sum"] == {"state": "holds", "figure": "4", "how": "adding", "values": {"total": 4.0}}
    assert said["verdicts"]["paid"]["state"] == "cannot be measured here"
    assert verdict.read(folder) is None and not (folder.parent / "VERDICTS.md").exists()
    assert os.environ.get(session.QUICK) is None


def test_only_a_recorded_full_run_is_kept_and_the_page_is_made_of_it(folder: Path) -> None:
    assert "llmlab lab run two-and-two --record" in collected.page()
    quick = llmlab("lab", "run", "two-and-two", "--quick")
    assert json.loads(quick.stdout.splitlines()[-1])["verdicts"]["sum"]["state"] == "does not hold"
    assert llmlab("lab", "run", "two-and-two", "--quick", "--record").exit_code == 2
    assert llmlab("lab", "run", "two-and-two", "--record").exit_code == 0
    kept = verdict.read(folder)
    assert kept and kept.form == "full" and (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    page = (folder.parent / "VERDICTS.md").read_text()
    assert "| Two and two are four | nowhere | **holds** | 4 | adding |" in page and r"A model \| of somebody" in page
    assert "Labs: 1. Claims with a verdict: 2, of which 1 hold, 0 do not hold, 1 cannot be measured here." in page
    assert llmlab("lab", "verdicts", "--check").exit_code == 0
    (folder.parent / "VERDICTS.md").write_text(page.replace("**holds**", "**does not hold**"))
    assert llmlab("lab", "verdicts", "--check").exit_code == 1
    llmlab("lab", "verdicts")
    assert (folder.parent / "VERDICTS.md").read_text() == page
    assert "1 holds, 1 cannot be measured here" in " ".join(llmlab("labs").stdout.replace("│", " ").split())


def test_verdicts_are_of_the_lab_as_it_is(folder: Path) -> None:
    llmlab("lab", "run", "two-and-two", "--record")
    script = folder / "lab.py"
    script.write_text(SCRIPT.replace("# # Two and two", "# # Two  and two, explained").replace("total == 4", "total  ==  4"))
    assert llmlab("lab", "verdicts", "--check").exit_code == 0, "comments and spaces decide nothing"
    for change in (("total == 4", "total == 5"), ("[2, 2]", "[2, 4]"), ("begin(", "begin[")):
        script.write_text(SCRIPT.replace(*change))
        assert llmlab("lab", "verdicts", "--check").exit_code != 0, change
    script.write_text(SCRIPT)
    (folder / "lab.yaml").write_text(as_yaml(DECLARATION | {"claims": CLAIMS | {"sum": {"text": "Five", "document": "x"}}}))
    with pytest.raises(LabError, match="other claims"):
        collected.page()


def test_a_lab_of_other_claims_than_its_verdicts_is_refused(folder: Path) -> None:
    llmlab("lab", "run", "two-and-two", "--record")
    (folder / "lab.yaml").write_text(as_yaml(DECLARATION | {"claims": {"sum": CLAIMS["sum"]}}))
    with pytest.raises(LabError, match="other claims"):
        collected.page()
    assert llmlab("lab", "run", "two-and-two").exit_code == 2
    (folder / "verdict.json").write_text("{}")
    with pytest.raises(RunIncomplete, match="is not a result"):
        collected.page()
    (folder / "plot.png").unlink()
    with pytest.raises(RunIncomplete, match=r"no plot\.png"):
        collected.page()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"name": "three"}, "says name: three"), ({"claims": {}}, "claims"), ({"needs": ["a horse"]}, "needs.0"),
     ({"minutes": 0}, "minutes"), ({"author": "me"}, "author: unknown key")],
)  # fmt: skip
def test_a_declaration_that_does_not_fit_is_refused(folder: Path, change: dict[str, Any], said: str) -> None:
    (folder / "lab.yaml").write_text(as_yaml(DECLARATION | change))
    with pytest.raises(ConfigError, match=said):
        declared.find("two-and-two")


def test_a_folder_that_lacks_a_file_and_a_name_that_is_none_are_refused(folder: Path) -> None:
    with pytest.raises(UnknownName, match="no lab named 'two-and-too'"):
        declared.find("two-and-too")
    (folder / "README.md").unlink()
    with pytest.raises(ConfigError, match=r"has no README\.md"):
        declared.find("two-and-two")


def test_a_lab_that_lacks_something_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(needs.NEEDS, "qdrant", needs.Need("a store", "make setup-stores", lambda: False))
    (folder / "lab.yaml").write_text(as_yaml(DECLARATION | {"needs": ["qdrant"]}))
    done = llmlab("lab", "run", "two-and-two")
    assert done.exit_code == 2 and "make setup-stores" in done.stderr
    assert "make setup-stores" in llmlab("labs").stdout


def test_a_script_without_a_verdict_is_refused(folder: Path) -> None:
    (folder / "lab.py").write_text("# %%\nlab = None\n")
    done = llmlab("lab", "run", "two-and-two")
    assert done.exit_code == 1 and "ended without a verdict" in done.stderr


def test_the_page_is_what_the_recorded_verdicts_say() -> None:
    collected.check()


@pytest.mark.parametrize("name", declared.names())
def test_every_lab_declares_its_claims_and_says_how_it_is_run(name: str) -> None:
    lab = declared.find(name)
    script, about = (lab.folder / "lab.py").read_text(), (lab.folder / "README.md").read_text()
    assert f'begin("{name}")' in script and script.startswith("# %% [markdown]\n# # ")
    assert f"llmlab lab run {name}" in about and about.startswith(f"# {lab.title}")
    recorded = verdict.read(lab.folder)
    assert recorded is None or isinstance(recorded, Result)


@pytest.mark.slow
@pytest.mark.parametrize("name", declared.names())
def test_every_lab_is_a_valid_notebook_with_the_same_cells(name: str, tmp_path: Path) -> None:
    pytest.importorskip("jupytext")
    import jupytext
    import nbformat

    done = llmlab("lab", "notebook", name, "-o", str(tmp_path / "a" / "lab.ipynb"))
    assert done.exit_code == 0, done.output
    notebook = nbformat.read(tmp_path / "a" / "lab.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    kept = [
        line for line in (declared.find(name).folder / "lab.py").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert [line for source in code for line in source.splitlines() if line and not line.startswith("#")] == kept
    assert notebook.cells[0].cell_type == "markdown" and len(code) >= 3
    assert jupytext.writes(notebook, fmt="py:percent").count("# %%") == len(notebook.cells)
    assert llmlab("lab", "notebook", name, "-o", str(tmp_path / "lab.txt")).exit_code == 2


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.campaign if n == CAPSTONE else pytest.mark.slow) for n in declared.names()]
)
def test_every_lab_runs_in_its_quick_form(name: str, tmp_path: Path) -> None:
    lab = declared.find(name)
    lacking = needs.missing(lab.needs)
    if lacking:
        pytest.skip("; ".join(n.what for n in lacking))
    before = verdict.read(lab.folder)
    done = subprocess.run([sys.executable, "-m", "labs", "lab", "run", name, "--quick"], cwd=ROOT, capture_output=True, text=True,
                          check=False, env=os.environ | {"LLMLAB_RUNS": str(tmp_path / "runs")})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert set(said["verdicts"]) == set(lab.claims) and said["form"] == "quick"
    assert verdict.read(lab.folder) == before
    assert not (tmp_path / "runs").exists()
