"""Markdown, HTML and plain text.

Run as a part of: make index DOCS=path/to/folder
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pipelines.rag.readers.section import Part, Read, Section, below_headings, check_size, one_line, text_of

if TYPE_CHECKING:
    from bs4.element import PageElement, Tag
    from markdown_it.token import Token

MAX_BYTES = 20_000_000

_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:[ \t]*['\"]?(.+?)['\"]?[ \t]*$", re.MULTILINE)
_HTML_DROPPED = ("title", "script", "style", "template", "noscript", "nav")
_HTML_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_HTML_BLOCKS = (
    "address", "article", "aside", "blockquote", "dd", "div", "dl", "dt", "figcaption", "figure", "footer",
    "form", "header", "hr", "li", "main", "ol", "p", "pre", "section", "table", "tr", "ul",
)  # fmt: skip
_LONGEST_TERM, _READ_OF_TERM = 60, 300  # characters of a heading, and of what it is made from
_HTML_MARK = "\x00"  # stands around a heading; no text file that is read here holds one
_HTML_END = "<!---->"  # ends a tag or comment that is still open, as browsers do; the parser would try at each "<" again
_HTML_AFTER = {"br": "\n", "td": " ", "th": " "}


def plain(content: bytes, stem: str) -> Read:
    """Read a text file as one section."""
    check_size(content, MAX_BYTES)
    return stem, [Section((stem,), text_of(content).strip())]


def markdown(content: bytes, stem: str) -> Read:
    """Read CommonMark: a section below each heading that is not inside a list or a quotation."""
    from markdown_it import MarkdownIt

    check_size(content, MAX_BYTES)
    text = text_of(content)
    title, front = stem, _FRONT_MATTER.match(text)
    if front:
        text = text[front.end() :]
        named = _FRONT_TITLE.search(front[1])
        title = named[1] if named else stem
    return below_headings(title, _markdown_parts(text.split("\n"), MarkdownIt("commonmark").parse(text)))


def html(content: bytes, stem: str) -> Read:
    """Read a page: a section below each heading, without scripts, styles and navigation."""
    from bs4 import BeautifulSoup

    check_size(content, MAX_BYTES)
    soup = BeautifulSoup(text_of(content) + _HTML_END, "html.parser")
    title = one_line(soup.title.get_text()) if soup.title else ""
    before, *rest = "".join(_html_pieces(soup.children, headings=True)).split(_HTML_MARK)
    parts = [Part(int(mark[0]), mark[1:], text) for mark, text in zip(rest[::2], rest[1::2], strict=True)]
    return below_headings(title or stem, [Part(0, "", before), *parts])


def _markdown_parts(lines: list[str], tokens: Sequence[Token]) -> list[Part]:
    # (level, heading, first line, line after it); a heading inside a list or a quotation stays text
    found: list[tuple[int, str, int, int]] = [(0, "", 0, 0)]
    for opening, inline in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open" and opening.level == 0 and opening.map:
            first, after = opening.map
            found.append((int(opening.tag[1]), _heading_text(inline), first, after))
    ends = [first for _, _, first, _ in found[1:]] + [len(lines)]
    return [Part(level, one_line(heading), "\n".join(lines[after:end]))
            for (level, heading, _, after), end in zip(found, ends, strict=True)]  # fmt: skip


def _heading_text(inline: Token) -> str:
    children = [child for child in inline.children or [] if child.type != "html_inline"]
    return "".join(" " if child.type.endswith("break") else child.content for child in children)


def _html_pieces(nodes: Iterable[PageElement], headings: bool) -> Iterator[str]:
    """Yield the text in one walk without recursion: changing the tree instead takes time by the square of its size.

    A term that can be linked to (as of functions and options in manuals) stands as a heading over what defines it; an empty
    heading ends the list.
    """
    from bs4.element import CData, NavigableString, Tag

    stack: list[PageElement | str | None] = list(nodes)  # None is the end of a list of definitions
    stack.reverse()
    lists: list[bool] = []  # that are open, and whether one of their terms is a heading
    while stack:
        node = stack.pop()
        if node is None:
            if lists[-1]:
                yield _html_heading(_level(lists), "")
            lists.pop()
        elif not isinstance(node, Tag):
            if type(node) in (str, NavigableString, CData):  # not comments and their like, which are derived from it
                yield str(node)
        elif node.name in _HTML_HEADINGS and headings:
            yield _html_heading(int(node.name[1]), _heading(node))
        elif node.name not in _HTML_DROPPED:
            around = "\n\n" if node.name in _HTML_BLOCKS else ""
            yield around
            if node.name == "dl" and headings:
                lists.append(False)
                stack.append(None)
            elif node.name == "dt" and lists and (term := _linked_term(node)):
                lists[-1] = True
                yield _html_heading(_level(lists), term)
            stack += [around or _HTML_AFTER.get(node.name, ""), *reversed(node.contents)]


def _html_heading(level: int, heading: str) -> str:
    return f"{_HTML_MARK}{level}{heading}{_HTML_MARK}"


def _level(lists: Sequence[bool]) -> int:
    return min(len(_HTML_HEADINGS) + len(lists), 9)


def _heading(node: Tag) -> str:
    """Return the text of a heading without the mark of its link."""
    return one_line("".join(_html_pieces(node.children, headings=False))).rstrip("¶ ")


def _linked_term(node: Tag) -> str:
    """Return a term that can be linked to as a heading; of a long one the beginning, since the whole is the text's as well.

    Nothing for a term without an id, and for one that shares its definition with the term before it, the heading of both. Only
    the beginning of the node is looked at: where ends are left out, all that follows is inside it.
    """
    from bs4.element import NavigableString, Tag

    if next((one.name for one in node.previous_siblings if isinstance(one, Tag)), "") == "dt":
        return ""
    linked, text = bool(node.get("id")), ""
    for inner in node.descendants:
        if isinstance(inner, Tag):
            if inner.name in ("dt", "dd"):
                break
            linked = linked or bool(inner.get("id"))
            text += " " if inner.name in _HTML_BLOCKS or inner.name in _HTML_AFTER else ""
        elif type(inner) is NavigableString:
            text += inner
        if len(text) > _READ_OF_TERM:
            break
    term = one_line(text).rstrip("¶ ") if linked else ""
    if len(term) <= _LONGEST_TERM:
        return term
    name = term.partition("(")[0]
    return name if len(name) <= _LONGEST_TERM else term[:_LONGEST_TERM].rpartition(" ")[0] or term[:_LONGEST_TERM]
