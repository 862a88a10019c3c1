"""Source code and settings: a section for each definition, named by its path, such as `load > Reader > read`.

Python is read by its own grammar and never run. Other languages are cut where a line without indent begins a definition, or
follows a blank line: their grammars are not known here, and a wrong cut only makes a section shorter or longer.
Run as a part of: make index DOCS=path/to/folder
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Sequence

from pipelines.rag.readers.section import Read, Section, Unreadable, check_size, text_of

MAX_BYTES = 5_000_000
MAX_LINE = 20_000  # of characters; such a line was made by a machine

_NAMES = tuple(re.compile(pattern) for pattern in (
    r"(?:[a-z]+ )*?(?:function\*?|class|interface|struct|enum|trait|impl|fn|func|def|module|namespace|record|type|mod|union)"
    r"(?: ?<[^>]{0,60}>)? +(?:\([^)]{0,80}\) *)?([A-Za-z_$][\w$.:]*)",                            # most languages
    r"(?i:create (?:or replace )?(?:[a-z]+ )?(?:table|view|function|procedure|trigger|index|type) (?:if not exists )?)([\w.\"]+)",
    r"(?:export )?(?:default )?(?:const|let|var) ([A-Za-z_$][\w$]*) *= *(?:async *)?(?:function|class|\()",  # JavaScript
    r"\[\[?([\w.\"' -]{1,80})\]\]?\s*$",                                                        # TOML
    r"([\w.\"'-]{1,80}):\s*$",                                                                  # YAML
    r"([\w-]{1,80}) *\(\) *\{?",                                                                # shell
    r"(?:[\w:<>,*&]{1,80} +[*&]*){1,6}([\w:~]{1,80}) *\([^;=]{0,200}$",                           # C, C++
))  # fmt: skip
_ENDS = ("end", "fi", "done", "esac", "EOF")
_NAMED_PREFIX = 300  # characters of a line in which a name is looked for

Block = ast.Module | ast.ClassDef
Definition = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def python(content: bytes, stem: str) -> Read:
    """Read Python: a section for each function, class and method; the rest of a module or class stays in reading order."""
    text = _source(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the code that is read, about its own strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # Python 2, a template, or nothing like Python
        return _by_indent(text, stem)
    lines = text.split("\n")
    return stem, [Section(path, part) for path, part in _definitions(lines, tree, (stem,), 0, len(lines))]


def other_code(content: bytes, stem: str) -> Read:
    """Read code of another language, or settings, by its lines without indent."""
    return _by_indent(_source(content), stem)


def _source(content: bytes) -> str:
    check_size(content, MAX_BYTES)
    text = text_of(content)
    longest = max(map(len, text.split("\n")))
    if longest > MAX_LINE:
        raise Unreadable(f"a line of {longest} characters, more than {MAX_LINE}: made by a machine")
    return text


def _definitions(
    lines: Sequence[str], block: Block, path: tuple[str, ...], start: int, end: int
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield path and text of what stands in the lines of a module or class, in reading order."""
    for node in block.body:
        if not isinstance(node, Definition):
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        while first > start and lines[first - 1].lstrip().startswith("#"):
            first -= 1  # a comment right above belongs to what it stands above
        after = node.end_lineno or node.lineno
        yield from _code(path, lines[start : max(first, start)])
        first = max(first, start)
        if isinstance(node, ast.ClassDef):
            yield from _definitions(lines, node, (*path, node.name), first, after)
        else:
            yield from _code((*path, node.name), lines[first:after])
        start = max(start, after)
    yield from _code(path, lines[start:end])


def _code(path: tuple[str, ...], lines: Sequence[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    text = "\n".join(lines).strip("\n")
    if text.strip():
        yield path, text


def _by_indent(text: str, stem: str) -> Read:
    blocks: list[tuple[str, list[str]]] = [("", [])]  # name of a block, and its lines
    blank = False
    for line in text.split("\n"):
        begins = bool(line) and not line[0].isspace() and line[0] not in ")]}" and line.rstrip() not in _ENDS
        name = _name(line) if begins else ""
        if begins and (blank or (name and blocks[-1][0])):
            blocks.append((name, []))
        elif name and not blocks[-1][0]:
            blocks[-1] = name, blocks[-1][1]
        blocks[-1][1].append(line)
        blank = not line.strip()
    return stem, [Section((stem, name) if name else (stem,), "\n".join(lines).strip("\n")) for name, lines in _joined(blocks)]


def _joined(blocks: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Return the blocks with neighbours without a name in one."""
    joined: list[tuple[str, list[str]]] = []
    for name, lines in blocks:
        if joined and not name and not joined[-1][0]:
            joined[-1][1].extend(lines)
        else:
            joined.append((name, list(lines)))
    return joined


def _name(line: str) -> str:
    found = (pattern.match(line[:_NAMED_PREFIX]) for pattern in _NAMES)
    return next((match[1].strip("\"' ") for match in found if match), "")
