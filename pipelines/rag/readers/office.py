"""Word documents (DOCX) and PDF; a PDF page without text that holds pictures is read by OCR.

What a file claims about its own size is checked before it is unpacked, and entities in XML are not expanded.
Headers, footers, notes and what was deleted with tracked changes are left out.
Run as a part of: make index DOCS=path/to/folder
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from pipelines.rag.readers.section import Part, Read, Section, Unreadable, below_headings, check_size, one_line, storable

if TYPE_CHECKING:
    from pypdf import PageObject

MAX_DOCX_BYTES, MAX_PDF_BYTES = 50_000_000, 200_000_000
MAX_UNPACKED_BYTES = 300_000_000  # of a DOCX file, pictures included
MAX_XML_BYTES = 50_000_000  # of one XML part of it
MAX_MEMBERS = 10_000
MAX_SCANNED_PAGES = 200  # of a PDF: each takes a second or more
MAX_PICTURES = 4  # of a page without text

_HEADING = re.compile(r"Heading ([1-9])")
# In a paragraph: its text, not the older form of a text box that stands beside the newer one.
_RUNS = ".//w:r/*[self::w:t or self::w:tab or self::w:br or self::w:cr][not(ancestor::*[local-name() = 'Fallback'])]"


def docx(content: bytes, stem: str) -> Read:
    """Read a Word document: headings by their styles, paragraphs, list items, and a line for each row of a table."""
    check_size(content, MAX_DOCX_BYTES)
    _check_zip(content)
    from docx import Document
    from docx.table import Table

    document = Document(io.BytesIO(content))
    named = any(block.style and block.style.name == "Title" for block in document.paragraphs)  # stands above "Heading 1"
    parts: list[tuple[int, str, list[str]]] = [(0, "", [])]
    for block in document.iter_inner_content():
        if isinstance(block, Table):
            parts[-1][2].append("\n".join(_rows(block)))
            continue
        text = _runs(block._p)
        level = _level(block, named)
        if level and text.strip():
            parts.append((level, one_line(text), []))
        elif _is_item(block):
            parts[-1][2].append(f"- {text.strip()}")
        else:
            parts[-1][2].append(text.strip())
    title = one_line(document.core_properties.title or "") or stem
    return below_headings(title, [Part(level, heading, _joined(texts)) for level, heading, texts in parts])


def pdf(content: bytes, stem: str) -> Read:
    """Read a PDF: a section for each page."""
    check_size(content, MAX_PDF_BYTES)
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(content))
    if reader.is_encrypted and not reader.decrypt(""):
        raise Unreadable("protected by a password")
    title = one_line(storable(reader.metadata.title or "")) if reader.metadata else ""
    sections, scanned = [], 0
    for number, page in enumerate(reader.pages, 1):
        text = storable(page.extract_text()).strip()
        if not text and (pictures := _pictures(page)):
            scanned += 1
            if scanned > MAX_SCANNED_PAGES:
                raise Unreadable(f"more than {MAX_SCANNED_PAGES} scanned pages")
            text = _scanned(page, pictures)
        sections.append(Section((title or stem,), text, number))
    return title or stem, sections


def _check_zip(content: bytes) -> None:
    """Raise `Unreadable` if a DOCX file unpacks to more than is read; what a member says of its size, `zipfile` holds to."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise Unreadable(f"{len(members)} files inside it, more than {MAX_MEMBERS}")
    if (size := sum(member.file_size for member in members)) > MAX_UNPACKED_BYTES:
        raise Unreadable(f"unpacks to {size} bytes, more than {MAX_UNPACKED_BYTES}")
    xml = max((m.file_size for m in members if m.filename.endswith((".xml", ".rels"))), default=0)
    if xml > MAX_XML_BYTES:
        raise Unreadable(f"holds {xml} bytes of XML in one part, more than {MAX_XML_BYTES}")


def _level(paragraph: Any, named: bool) -> int:
    style = paragraph.style.name if paragraph.style is not None else ""
    if style == "Title":
        return 1
    found = _HEADING.fullmatch(style or "")
    return int(found[1]) + named if found else 0


def _is_item(paragraph: Any) -> bool:
    style = paragraph.style.name if paragraph.style is not None else ""
    properties = paragraph._p.pPr
    return (style or "").startswith("List") or (properties is not None and properties.numPr is not None)


def _runs(element: Any) -> str:
    """Return the text of a paragraph, that of links and of tracked insertions included."""
    texts = {"tab": "\t", "br": "\n", "cr": "\n"}
    return "".join(texts.get(node.tag.rsplit("}", 1)[1], node.text or "") for node in element.xpath(_RUNS))


def _rows(table: Any) -> Iterator[str]:
    """Yield a line for each row below the first, `header: cell` if it is as wide; merged cells come once."""
    rows = [[_cell(cell) for cell in row.tc_lst] for row in table._tbl.tr_lst]
    header = rows[0] if len(rows) > 1 else []
    for row in rows[1:] or rows:
        pairs = zip(header, row, strict=True) if len(header) == len(row) else zip_longest((), row, fillvalue="")
        yield "; ".join(f"{name}: {cell}" if name else cell for name, cell in pairs if cell)


def _cell(cell: Any) -> str:
    return one_line(" ".join(_runs(paragraph) for paragraph in cell.xpath(".//w:p")))


def _joined(texts: Sequence[str]) -> str:
    """Return paragraphs with a blank line between them, and items of a list without."""
    pieces, before = list[str](), ""
    for text in filter(None, texts):
        pieces += ["\n" if before.startswith("- ") and text.startswith("- ") else "\n\n", text]
        before = text
    return "".join(pieces)


def _pictures(page: PageObject) -> list[str]:
    """Return the names of the pictures on a page that OCR could read, the largest first."""
    from pipelines.rag.readers.image import MAX_PIXELS, MIN_SIDE

    resources: Any = page.get("/Resources")
    found = (resources.get_object() if resources else {}).get("/XObject")
    sizes = {}
    for name, item in (found.get_object() if found else {}).items():
        picture = item.get_object()
        if picture.get("/Subtype") == "/Image":
            width, height = int(picture.get("/Width", 0)), int(picture.get("/Height", 0))
            if min(width, height) >= MIN_SIDE and width * height <= MAX_PIXELS:
                sizes[name] = width * height
    return sorted(sizes, key=lambda name: -sizes[name])[:MAX_PICTURES]


def _scanned(page: PageObject, pictures: Sequence[str]) -> str:
    from pipelines.rag.readers.image import text_in

    texts = []
    for name in pictures:
        try:
            image = page.images[name].image
            texts.append(text_in(image.rotate(-page.rotation, expand=True)) if image is not None else "")
        except Exception:  # a picture in a form that cannot be unpacked; the other pages are still wanted
            continue
    return "\n\n".join(text for text in texts if text)
