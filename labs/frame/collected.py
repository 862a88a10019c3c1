"""labs/VERDICTS.md: every lab's last recorded verdicts on one page, generated. `llmlab lab verdicts [--check]`"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from labs.frame import declared, verdict
from labs.frame.declared import Lab
from labs.frame.verdict import FAILS, HOLDS, PLOT, UNKNOWN, Result
from pipelines import runs
from pipelines.errors import LabError

FILE = "VERDICTS.md"
HEAD = """# Verdicts

What the document says, put to the test on one machine, lab by lab. A claim holds, does not hold, or cannot be measured here, and
then it says why. Small models that were trained for a lab show how a mechanism works and what it costs, not how good a released
model is. This page is written by `llmlab lab verdicts` from what `llmlab lab run NAME --record` left in each lab's folder; do not
edit it."""


def path() -> Path:
    """Return the page's path."""
    return declared.FOLDER / FILE


def write() -> Path:
    """Write the page and return its path."""
    runs.write_text(path(), page())
    return path()


def check() -> None:
    """Raise `LabError` if the page is not what the labs' folders say."""
    if not path().is_file() or path().read_text(encoding="utf-8") != page():
        raise LabError(f"labs/{FILE} differs from the labs' recorded verdicts", "the generated page", "llmlab lab verdicts")


def page() -> str:
    """Return the page as Markdown.

    Raises:
        LabError: a recorded result is not of its lab as it is now.
    """
    both = [(lab, recorded(lab)) for lab in declared.all_labs()]
    counts = Counter(v.state for _, result in both if result for v in result.verdicts.values())
    summary = ", ".join(f"{counts[state]} {words}" for state, words in (
        (HOLDS, "hold"), (FAILS, "do not hold"), (UNKNOWN, "cannot be measured here")))  # fmt: skip
    lines = [HEAD, "", f"Labs: {len(both)}. Claims with a verdict: {sum(counts.values())}, of which {summary}.", ""]
    for lab, result in both:
        lines += [*_section(lab, result), ""]
    return "\n".join(lines).rstrip() + "\n"


def recorded(lab: Lab) -> Result | None:
    """Return a lab's recorded result, None if it was never recorded.

    Raises:
        LabError: it is not of the lab as it is now, claims and cells, or of the quick form.
    """
    result = verdict.read(lab.folder)
    if result and (result.fingerprint != lab.fingerprint or result.form != "full" or result.lab != lab.name):
        raise LabError(f"labs/{lab.name}/{verdict.FILE} is of other claims than {declared.DECLARED}, of other cells than "
                       f"{declared.SCRIPT}, or of the quick form",
                       "a full run of the lab as it is", f"llmlab lab run {lab.name} --record")  # fmt: skip
    return result


def _section(lab: Lab, result: Result | None) -> Iterator[str]:
    yield f"## [{lab.title}]({lab.name}/{declared.ABOUT})"
    yield ""
    if result is None:
        yield f"Not recorded yet: `llmlab lab run {lab.name} --record`, about {lab.minutes:g} minutes."
        return
    yield "| claim | in the document | verdict | figure | how it was measured |"
    yield "|---|---|---|---|---|"
    for key, claim in lab.claims.items():
        found = result.verdicts[key]
        cells = (claim.text, claim.document, f"**{found.state}**", found.figure, found.how)
        yield "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
    yield ""
    yield f"![{lab.title}]({lab.name}/{PLOT})"
    yield ""
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    yield f"`llmlab lab run {lab.name}`: {result.date}, {result.seconds:.0f} s on {result.machine}; {versions}."
