"""Questions that a page of documentation answers itself, made by rule from its headings and definitions.

    docs_headings       of a heading; its section answers: "What is there to know about logging to a file?"
    docs_definitions    of a name that is defined: "What does os.path.join do?"
    docs_purposes       of what something is for, without its name: "How can I join one or more path segments intelligently?"

Pages are those of Sphinx (Python), DocBook (PostgreSQL) and AsciiDoc (git). They are parsed here a second time, apart from the
reader of pipelines.rag, so that what it loses counts against it. Run as a part of: llmlab bench rag
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipelines.rag.readers.section import one_line

if TYPE_CHECKING:
    from bs4 import BeautifulSoup
    from bs4.element import PageElement, Tag

Kind = Literal["docs_headings", "docs_definitions", "docs_purposes"]
KINDS: tuple[Kind, ...] = ("docs_headings", "docs_definitions", "docs_purposes")
OPENING_CHARACTERS = 48
FEWEST_SECTION_CHARACTERS, FEWEST_HEADING_WORDS = 120, 2
PURPOSE_WORDS = range(4, 15)

_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_AROUND = {"sphinxsidebar", "related", "navheader", "navfooter", "toc", "footer"}
_CALLED = {"function", "method", "classmethod", "staticmethod", "macro", "opcode"}
_MANUAL_SECTION = re.compile(r"\(\d\)$")
_SETTING = re.compile(r"\w+(?:[._]\w+)+")
_NUMBER = re.compile(r"^(?:(?:Chapter|Appendix|Part) )?(?:[A-Z]\.|[IVX]+\.|\d+\.)[\d.]* ")
_CLAUSE = re.compile(r"[.;:,(]\s|[.;:,]$|[.;:(]")
_VERBS = frozenset(
    "add append apply call change check close collect compare compile compute construct convert copy create decode delete display"
    " draw encode execute extract fetch find format generate get import initialize insert join limit list load locate lock make"
    " merge move open parse print produce pull push query raise read record register remove rename replace reset restore return"
    " run schedule search select send set show sort specify split start stop store suspend swap switch terminate test transform"
    " unlock update verify wait write".split()
)


@dataclass(frozen=True)
class Posed:
    """A question and where its answer stands.

    Attributes:
        kind: of question.
        text: the question.
        source: the page.
        mark: what the answer is known by: the heading of its section, or how it begins.
    """

    kind: Kind
    text: str
    source: str
    mark: str


def posed(pages: Iterable[tuple[str, str]]) -> list[Posed]:
    """Return the questions of all pages, without those that more than one place answers.

    Args:
        pages: source and HTML of each.
    """
    every = [question for source, page in pages for question in questions_of(source, page)]
    texts = Counter(q.text.lower() for q in every)
    marks = Counter((q.kind, q.mark.lower()) for q in every)
    return [q for q in every if texts[q.text.lower()] == 1 and marks[q.kind, q.mark.lower()] == 1]


def questions_of(source: str, page: str) -> Iterator[Posed]:
    """Yield the questions of a page."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(page, "html.parser")
    nodes = list(_walk(soup))
    for heading in _headings(nodes):
        yield Posed("docs_headings", _about(heading), source, heading)
    title = plain(soup.title.get_text()) if soup.title else source
    for question, text in _definitions(nodes, _MANUAL_SECTION.sub("", title).replace("git-", "git ")):
        opening = text[:OPENING_CHARACTERS]
        if len(opening) < OPENING_CHARACTERS:
            continue
        yield Posed("docs_definitions", question, source, opening)
        if purpose := _purpose(text):
            yield Posed("docs_purposes", f"How can I {purpose}?", source, opening)
    for question, line in _manual_purposes(nodes):
        yield Posed("docs_purposes", question, source, line)


def plain(heading: str) -> str:
    """Return a heading without its number and the sign of its link."""
    return _NUMBER.sub("", one_line(heading).removesuffix("¶").strip())


def _walk(soup: BeautifulSoup) -> Iterator[PageElement]:
    """Yield tags and texts in the order of the page, without what stands around it on every page and inside headings."""
    from bs4.element import Tag

    stack: list[PageElement] = [soup]
    while stack:
        node = stack.pop()
        if not isinstance(node, Tag):
            yield node
        elif node.name not in ("nav", "script", "style") and not _AROUND.intersection(node.get_attribute_list("class")):
            yield node
            if node.name not in _HEADINGS:
                stack += reversed(node.contents)


def _headings(nodes: Iterable[PageElement]) -> Iterator[str]:
    """Yield the headings that have text of their own before the next one."""
    from bs4.element import NavigableString, Tag

    heading, own = "", 0
    for node in nodes:
        if isinstance(node, Tag) and node.name in _HEADINGS:
            heading, own = plain(node.get_text()), 0
        elif type(node) is NavigableString and heading:
            own += len(node.strip())
            if own >= FEWEST_SECTION_CHARACTERS:
                if len(heading.split()) >= FEWEST_HEADING_WORDS and " > " not in heading:
                    yield heading
                heading = ""


def _about(heading: str) -> str:
    heading = heading.rpartition(" — ")[2]  # of a module what it is for, not its name
    first, _, rest = heading.partition(" ")
    lowered = heading if first.isupper() or not first.isalpha() else f"{first.lower()} {rest}"
    if first.lower() in ("how", "why", "when", "what", "which", "where", "is", "are", "can", "do", "does"):
        return heading.rstrip("?") + "?"
    if first.endswith("ing"):
        return f"How does {lowered.rstrip('.')} work?"
    return f"What is there to know about {lowered.rstrip('.')}?"


def _definitions(nodes: Iterable[PageElement], subject: str) -> Iterator[tuple[str, str]]:
    """Yield a question about each name that is defined, and the text that defines it."""
    from bs4.element import Tag

    for node in nodes:
        if not isinstance(node, Tag) or node.name != "dd":
            continue
        terms, paragraph = _terms(node), node.find("p")
        if terms and paragraph:
            signed = "sig" in terms[0].get_attribute_list("class")
            question = _signature_question(terms[0]) if signed else _term_question(terms, subject)
            if question:
                yield question, one_line(paragraph.get_text())


def _terms(description: Tag) -> list[Tag]:
    """Return the `dt` tags right in front of a `dd`, in their order."""
    terms: list[Tag] = []
    for tag in description.find_previous_siblings():
        if tag.name != "dt":
            break
        terms.insert(0, tag)
    return terms


def _signature_question(term: Tag) -> str | None:
    name = str(term.get("id") or "").removeprefix("c.")
    if not name or name.startswith("cmdoption-"):
        return None
    kinds = term.parent.get_attribute_list("class") if term.parent else []
    return f"What does {name} do?" if _CALLED.intersection(kinds) else f"What is {name}?"


def _term_question(terms: Sequence[Tag], subject: str) -> str | None:
    """Return a question about the longest of some terms, which say the same."""
    if str(terms[0].get("id") or "").startswith("term-"):
        return f"What does the term {plain(terms[0].get_text())} mean?"
    if "hdlist1" not in terms[0].get_attribute_list("class") and terms[0].find(class_="term") is None:
        return None
    names = [name for term in terms for name in _names(one_line(term.get_text(" ")))]
    name = max(names, key=len, default="")
    if not re.search(r"\w{3}", name):
        return None
    return f"What does {name} do?" if _SETTING.fullmatch(name) else f"What does {name} mean in {subject}?"


def _names(term: str) -> list[str]:
    """Return the names in a term: of "-d --no-createdb" each option, of "wal_level (enum)" what stands before the bracket."""
    if term.startswith("-"):
        return re.findall(r"(?<!\S)--?[\w-]*\w", term)
    return [re.split(r" ?[\[<(=…]| ?\.\.\.", term)[0]]


def _purpose(text: str) -> str | None:
    """Return what a sentence in the imperative asks for, up to its first break, or None if it is not one."""
    first, _, rest = text.partition(" ")
    first = first.lower()
    forms = (first, first.removesuffix("s"), first.removesuffix("es"), first.removesuffix("ies") + "y")
    verb = next((form for form in forms if form in _VERBS), None)
    clause = f"{verb} {_CLAUSE.split(rest)[0].strip()}"
    return clause if verb and len(clause.split()) in PURPOSE_WORDS else None


def _manual_purposes(nodes: Sequence[PageElement]) -> Iterator[tuple[str, str]]:
    """Yield a question from the line of a manual page that tells name and purpose, and the line."""
    from bs4.element import Tag

    named = False
    for node in nodes:
        if not isinstance(node, Tag):
            continue
        if node.name in _HEADINGS:
            named = node.name == "h2" and (node.get_text() == "NAME" or _in_class(node, "refnamediv"))
        elif named and node.name == "p":
            named, line = False, one_line(node.get_text())
            purpose = re.split(r" [—-]+ ", line, maxsplit=1)[-1]
            if purpose != line and len(purpose.split()) >= PURPOSE_WORDS[0]:
                yield f"Which command is there to {purpose[0].lower()}{purpose[1:].rstrip('.')}?", line


def _in_class(node: Tag, name: str) -> bool:
    return node.parent is not None and name in node.parent.get_attribute_list("class")
