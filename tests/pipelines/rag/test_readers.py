"""Readers of Word, tables, records, code and pictures, through `load` and `sync`, on real files."""

from __future__ import annotations

import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import docx
import matplotlib
import pytest
from PIL import Image, ImageDraw, ImageFont
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas

from pipelines.rag.index import RagConfig, open_index, sync
from pipelines.rag.load import KINDS, load
from pipelines.rag.readers import code, image, markup, office, tabular
from tests.pipelines.rag.conftest import read_one, sections

FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def reason(folder: Path, name: str, content: str | bytes) -> str:
    (folder / "other.txt").write_text("readable")
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (skipped,) = load(folder)[1]
    return skipped.reason


def saved(document: Any) -> bytes:
    buffer = io.BytesIO()
    document.save(buffer)
    return buffer.getvalue()


def word(title: str = "") -> Any:
    document = docx.Document()
    document.core_properties.title = title
    return document


def drawn(*lines: str, size: tuple[int, int] = (900, 260)) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.truetype(FONT, 34)
    for row, line in enumerate(lines):
        draw.text((40, 30 + 80 * row), line, fill="black", font=font)
    return picture


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def test_word_headings_lists_and_tables(tmp_path: Path) -> None:
    document = word("Properties title")
    document.add_paragraph("Before any heading.")
    document.add_heading("Travel", 1)
    document.add_paragraph("Book early.")
    document.add_paragraph("passport", style="List Bullet")
    document.add_paragraph("ticket", style="List Number")
    document.add_heading("Rates", 2)
    table = document.add_table(3, 2)
    for cell, text in zip(table._cells, ["city", "rate", "Oslo", "120 EUR", "Rome", "90 EUR"], strict=True):
        cell.text = text
    document.add_paragraph("After the table.")
    document.add_heading("Contact", 1)
    assert sections(read_one(tmp_path, "policy.docx", saved(document))) == [
        ("Travel", "Before any heading."),
        ("Travel", "Book early.\n\n- passport\n- ticket"),
        ("Travel > Rates", "city: Oslo; rate: 120 EUR\ncity: Rome; rate: 90 EUR\n\nAfter the table."),
        ("Contact", "Contact"),
    ]


def test_a_word_title_stands_above_its_headings(tmp_path: Path) -> None:
    document = word()
    document.add_heading("Handbook", 0)
    document.add_heading("Leave", 1)
    document.add_paragraph("25 days.")
    found = read_one(tmp_path, "a.docx", saved(document))
    assert (found.title, found.kind, sections(found)) == ("Handbook", "docx", [("Handbook > Leave", "25 days.")])
    plain = word("From properties")
    plain.add_paragraph("Only text.")
    assert sections(read_one(tmp_path, "a.docx", saved(plain))) == [("From properties", "Only text.")]


def test_word_keeps_links_and_insertions_and_merged_cells_once(tmp_path: Path) -> None:
    document = word("T")
    paragraph = document.add_paragraph("See ")
    for tag, text in (("ins", "inserted"), ("hyperlink", " linked"), ("del", "gone")):
        part = docx.oxml.OxmlElement(f"w:{tag}")
        run = docx.oxml.OxmlElement("w:r")
        inner = docx.oxml.OxmlElement("w:delText" if tag == "del" else "w:t")
        inner.text = text
        run.append(inner)
        part.append(run)
        paragraph._p.append(part)
    table = document.add_table(2, 3)
    for cell, text in zip(table._cells, "abcdef", strict=True):
        cell.text = text
    table.cell(1, 0).merge(table.cell(1, 1))
    assert sections(read_one(tmp_path, "a.docx", saved(document))) == [("T", "See inserted linked\n\nd e; f")]


def test_a_csv_row_is_a_section(tmp_path: Path) -> None:
    text = 'name,city,note\nAda,London,"wrote, and\ncounted"\nBo,,\n\nCy,Rome,x,extra\n'
    document = read_one(tmp_path, "people.csv", text)
    assert document.kind == "table" and sections(document) == [
        ("people", "name: Ada\ncity: London\nnote: wrote, and counted"),
        ("people", "name: Bo"),
        ("people", "name: Cy\ncity: Rome\nnote: x\ncolumn 4: extra"),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "item;price\nbread, white;1,50\n"),
        ("t.csv", "item\tprice\nbread, white\t1,50\n"),
        ("t.csv", "item|price\r\nbread, white|1,50\r\n"),
        ("t.csv", '\ufeffitem,price\n"bread, white","1,50"\n'),
        ("t.tsv", "item\tprice\nbread, white\t1,50\n"),
    ],
)
def test_the_delimiter_is_found(tmp_path: Path, name: str, text: str) -> None:
    assert sections(read_one(tmp_path, name, text)) == [("t", "item: bread, white\nprice: 1,50")]


def test_a_first_row_with_numbers_is_no_header_but_years_may_name_columns(tmp_path: Path) -> None:
    assert sections(read_one(tmp_path, "t.csv", "Oslo,120\nRome,90\n")) == [
        ("t", "column 1: Oslo\ncolumn 2: 120"),
        ("t", "column 1: Rome\ncolumn 2: 90"),
    ]
    assert sections(read_one(tmp_path, "t.csv", "country,2019,2020\nFrance,67.1,67.2\n")) == [
        ("t", "country: France\n2019: 67.1\n2020: 67.2")
    ]
    assert sections(read_one(tmp_path, "t.csv", "only\nvalues\n")) == [("t", "only: values")]


def test_a_record_is_a_section_with_dotted_keys(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "user": {"name": "Ada", "tags": ["x", "y"]}, "active": True, "none": None, "empty": ""},
        {"title": "Rules", "text": "First.\n\nSecond.", "url": "https://example.org"},
        ["loose", 1],
    ]
    document = read_one(tmp_path, "r.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    expected = [
        ("r", "id: 7\nuser.name: Ada\nuser.tags: x, y\nactive: true"),
        ("r > Rules", "First.\n\nSecond.\n\nurl: https://example.org"),
        ("r", "loose, 1"),
    ]
    assert document.kind == "records" and sections(document) == expected
    (tmp_path / "r.jsonl").unlink()
    assert sections(read_one(tmp_path, "r.json", json.dumps(rows))) == expected


def test_a_json_object_is_a_record_and_its_lists_are_records_below_their_keys(tmp_path: Path) -> None:
    value = {"version": 2, "people": [{"name": "Ada"}, {"name": "Bo", "pets": [{"kind": "cat"}]}], "on": {"a": 1}}
    assert sections(read_one(tmp_path, "d.json", json.dumps(value))) == [
        ("d", "version: 2\non.a: 1"),
        ("d > people", "name: Ada"),
        ("d > people", "name: Bo\npets.1.kind: cat"),
    ]


def test_an_inserted_row_leaves_the_other_chunks_what_they_were(tmp_path: Path, config: RagConfig, hash_embedder: Any) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "t.csv").write_text("name,city\nAda,London\nBo,Oslo\n")
    sync(docs, "lab", config, hash_embedder)
    (docs / "t.csv").write_text("name,city\nNew,Rome\nAda,London\nBo,Oslo\n")
    change = sync(docs, "lab", config, hash_embedder).change
    assert (change.new_chunks, change.gone_chunks, change.to_embed) == (1, 0, 1)


PYTHON = '''"""About."""
import os

# Greets.
@cached
def greet(name):
    """Say hello."""
    def inner(): ...
    return f"\\d{name}"

class Dog(Animal):
    """A dog."""
    legs = 4

    def bark(self):
        return "woof"

    class Tail:
        def wag(self): ...

    async def run(self): ...

LAST = 1
'''


def test_python_is_cut_by_its_grammar(tmp_path: Path) -> None:
    document = read_one(tmp_path, "pets.py", PYTHON)
    assert document.kind == "code" and sections(document) == [
        ("pets", '"""About."""\nimport os'),
        ("pets > greet", PYTHON[PYTHON.index("# Greets") : PYTHON.index("\n\nclass")]),
        ("pets > Dog", 'class Dog(Animal):\n    """A dog."""\n    legs = 4'),
        ("pets > Dog > bark", '    def bark(self):\n        return "woof"'),
        ("pets > Dog > Tail", "    class Tail:"),
        ("pets > Dog > Tail > wag", "        def wag(self): ..."),
        ("pets > Dog > run", "    async def run(self): ..."),
        ("pets", "LAST = 1"),
    ]


OTHER_CODE = [
    ("a.py", "print 'two'\n\ndef old():\n    pass\n", ["", "old"]),
    ("a.js", "import x from 'y'\n\nexport default function go(a) {\n\n  run()\n}\n\nconst late = async (b) => {\n}\n",
     ["", "go", "late"]),
    ("a.ts", "export interface Shape {\n  side: number\n}\n\nexport abstract class Box implements Shape {\n}\n",
     ["Shape", "Box"]),
    ("a.go", "package main\n\n// Start begins.\nfunc (s *Server) Start() error {\n\treturn nil\n}\n\ntype T struct {\n}\n",
     ["", "Start", "T"]),
    ("a.rs", "use std;\n\n#[derive(Debug)]\npub struct Point {\n}\n\nimpl<T> Point<T> {\n    fn x() {}\n}\n",
     ["", "Point", "Point"]),
    ("a.java", "package x;\n\npublic final class Main {\n\n  void a() {}\n\n  void b() {}\n}\n", ["", "Main"]),
    ("a.c", "#include <a.h>\n\nstatic int add(int a, int b)\n{\n    return a;\n}\n\nint main(void) {\n}\n",
     ["", "add", "main"]),
    ("a.cpp", "namespace n {\n}\n\nvoid Dog::bark(int n) {\n}\n", ["n", "Dog::bark"]),
    ("a.rb", "require 'x'\n\nclass Dog\n  def bark\n  end\nend\n\ndef run\nend\n", ["", "Dog", "run"]),
    ("a.sh", "set -e\n\nclean() {\n  rm x\n}\n\nfunction build {\n  make\n}\n", ["", "clean", "build"]),
    ("a.sql", "CREATE TABLE users (\n  id int\n);\n\ncreate or replace view v as\n  select 1;\n\nSELECT 2;\n",
     ["users", "v", ""]),
    ("a.yaml", "version: 3\nservices:\n  web:\n    image: x\nvolumes:\n  data: {}\n", ["services", "volumes"]),
    ("a.toml", 'name = "x"\n\n[tool.ruff]\nline = 1\n\n[[bin]]\npath = "y"\n', ["", "tool.ruff", "bin"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), OTHER_CODE)
def test_other_code_is_cut_at_definitions_and_nothing_is_lost(tmp_path: Path, name: str, text: str, expected: list[str]) -> None:
    document = read_one(tmp_path, name, text)
    assert ["".join(section.path[1:]) for section in document.sections] == expected
    assert "".join("".join(s.text.split()) for s in document.sections) == "".join(text.split())


@pytest.mark.slow
def test_pictures_are_read_by_ocr_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something is fetched")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    image._engine.cache_clear()
    first, second = drawn("Invoice 4711", "Total 99.50 EUR"), drawn("Second page")
    for name, content in (
        ("a.png", encoded(first, "PNG")),
        ("a.jpg", encoded(first, "JPEG", quality=90)),
        ("a.webp", encoded(first, "WEBP")),
        ("a.png", encoded(drawn("Invoice 4711", "Total 99.50 EUR").convert("L").convert("1"), "PNG")),
    ):
        document = read_one(tmp_path, name, content)
        assert document.kind == "image" and sections(document) == [("a", "Invoice 4711\nTotal 99.50 EUR")], name
        (tmp_path / name).unlink()
    pages = read_one(tmp_path, "a.tiff", encoded(first, "TIFF", save_all=True, append_images=[second]))
    assert [(s.page, s.text) for s in pages.sections] == [(1, "Invoice 4711\nTotal 99.50 EUR"), (2, "Second page")]


def test_clear_ground_and_turned_photographs_are_read(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (900, 200), (0, 0, 0, 0))
    ImageDraw.Draw(clear).text((40, 60), "Black on nothing", fill="black", font=ImageFont.truetype(FONT, 34))
    assert read_one(tmp_path, "a.png", encoded(clear, "PNG")).sections[0].text == "Black on nothing"
    (tmp_path / "a.png").unlink()
    turned, exif = drawn("A turned photograph").rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    assert read_one(tmp_path, "a.jpg", encoded(turned, "JPEG", exif=exif)).sections[0].text == "A turned photograph"


def test_words_on_one_height_are_one_line(tmp_path: Path) -> None:
    picture = drawn("Total")
    ImageDraw.Draw(picture).text((560, 32), "99.50 EUR", fill="black", font=ImageFont.truetype(FONT, 34))
    ImageDraw.Draw(picture).text((40, 130), "Thank you", fill="black", font=ImageFont.truetype(FONT, 34))
    assert read_one(tmp_path, "a.png", encoded(picture, "PNG")).sections[0].text == "Total 99.50 EUR\nThank you"


@pytest.mark.parametrize("rotation", [0, 90])
def test_a_scanned_page_of_a_pdf_is_read_by_ocr(tmp_path: Path, rotation: int) -> None:
    buffer = io.BytesIO()
    canvas = Canvas(buffer, pagesize=(500, 500))
    canvas.drawString(72, 400, "Typed page.")
    canvas.showPage()
    canvas.setPageRotation(rotation)
    canvas.drawImage(ImageReader(drawn("Scanned page", "with two lines").rotate(rotation, expand=True)), 0, 100, 400, 200)
    canvas.showPage()
    canvas.save()
    document = read_one(tmp_path, "scan.pdf", buffer.getvalue())
    assert [(s.page, s.text) for s in document.sections] == [(1, "Typed page."), (2, "Scanned page\nwith two lines")]


def test_a_picture_that_cannot_be_unpacked_costs_only_its_own_text(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    canvas = Canvas(buffer, pagesize=(500, 500), pageCompression=0)
    canvas.drawString(72, 400, "Typed page.")
    canvas.showPage()
    canvas.drawImage(ImageReader(drawn("Scanned")), 0, 100, 400, 200)
    canvas.showPage()
    canvas.save()
    broken = buffer.getvalue().replace(b"/FlateDecode", b"/NoSuchForm!")
    assert broken != buffer.getvalue()
    assert [s.text for s in read_one(tmp_path, "scan.pdf", broken).sections] == ["Typed page."]


def test_a_picture_without_text_is_looked_at_once(
    tmp_path: Path, config: RagConfig, hash_embedder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "n.md").write_text("# N\n\nA note.\n")
    (docs / "p.png").write_bytes(encoded(Image.new("RGB", (60, 60), "white"), "PNG"))
    first = sync(docs, "lab", config, hash_embedder)
    assert [(s.path, s.reason) for s in first.skipped] == [("p.png", "no text in it")]
    with monkeypatch.context() as patch:
        patch.setattr(image, "_engine", lambda: pytest.fail("it is looked at again"))
        assert sync(docs, "lab", config, hash_embedder).skipped == first.skipped
    (docs / "p.png").write_bytes(encoded(drawn("Words now"), "PNG"))
    assert not sync(docs, "lab", config, hash_embedder).skipped


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_what_is_too_large_is_left_out_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = members(saved(word()))
    monkeypatch.setattr(tabular, "MAX_ROWS", 3)
    monkeypatch.setattr(code, "MAX_BYTES", 50)
    monkeypatch.setattr(code, "MAX_LINE", 20)
    monkeypatch.setattr(image, "MAX_PIXELS", 10_000)
    monkeypatch.setattr(office, "MAX_UNPACKED_BYTES", 1_500_000)
    monkeypatch.setattr(office, "MAX_XML_BYTES", 500_000)
    for name, content, expected in (
        ("a.csv", "x,y\n" + "1,2\n" * 4, "more than 3 rows"),
        ("a.csv", ",".join("a" * 1001), "1001 columns, more than 1000"),
        ("a.csv", '"' + "a" * 200_000, "field larger than field limit"),
        ("a.json", "[1, 2, 3, 4]", "4 records, more than 3"),
        ("a.json", '{"a":' * 30 + "1" + "}" * 30, "more than 20 objects or lists inside each other"),
        ("a.json", "[" * 100_000, "not JSON that is read here"),
        ("a.json", "{'a': 1}", "not JSON (line 1, column 2: "),
        ("a.jsonl", '{"a": 1}\n{"a": }', "not JSON (line 2: column 7: "),
        ("a.jsonl", "9" * 5000, "not JSON that is read here (line 1: "),
        ("a.py", "x = 1\n" * 9, "54 bytes, more than the 50 that are read of such a file"),
        ("a.js", "x" * 21, "a line of 21 characters"),
        ("a.png", encoded(Image.new("1", (101, 100)), "PNG"), "101 x 100 pixels, more than 10000"),
        ("a.docx", zipped(small | {"media/a.bin": bytes(1_000_000)}), "unpacks to "),
        ("a.docx", zipped(small | {"word/document.xml": b" " * 510_000}), "holds 510000 bytes of XML in one part"),
    ):  # fmt: skip
        assert expected in reason(tmp_path, name, content), name
        (tmp_path / name).unlink()


def test_entities_in_a_word_document_are_not_expanded(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("PRIVATE")
    (tmp_path / "docs").mkdir()
    document = word("T")
    document.add_paragraph("Before &here; after")
    small = members(saved(document))
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))

    def declaring(entities: str) -> bytes:
        xml = small["word/document.xml"].replace(b"<w:document", f"<!DOCTYPE x [{entities}]>\n<w:document".encode(), 1)
        return zipped(small | {"word/document.xml": xml.replace(b"&amp;here;", b"&here;")})

    assert "amplification" in reason(tmp_path / "docs", "a.docx", declaring(f'<!ENTITY l0 "ha">{laughs}<!ENTITY here "&l11;">'))
    (tmp_path / "docs" / "other.txt").unlink()
    outside = declaring(f'<!ENTITY here SYSTEM "{(tmp_path / "secret").as_uri()}">')
    assert sections(read_one(tmp_path / "docs", "a.docx", outside)) == [("T", "Before")]


def test_what_cannot_be_stored_is_replaced(tmp_path: Path) -> None:
    assert sections(read_one(tmp_path, "a.jsonl", r'{"title": "a\ud800b", "text": "c\u0000d\udfffe"}')) == [("a > a?b", "cd?e")]


def test_kinds_are_stored_and_filter_and_do_not_change_ids(tmp_path: Path, config: RagConfig, hash_embedder: Any) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    document = word("Manual")
    document.add_paragraph("Press the button.")
    (docs / "manual.docx").write_bytes(saved(document))
    (docs / "t.csv").write_text("name,city\nAda,London\n")
    (docs / "r.jsonl").write_text('{"text": "A record."}\n')
    (docs / "m.py").write_text("def f():\n    return 1\n")
    (docs / "n.md").write_text("# N\n\nA note.\n")
    (docs / "p.png").write_bytes(encoded(drawn("Painted words"), "PNG"))
    sync(docs, "lab", config, hash_embedder)
    index = open_index("lab", hash_embedder)
    by_kind = {c.kind: c for c in index.chunks}
    assert {kind: c.text for kind, c in by_kind.items()} == {
        "docx": "Press the button.", "table": "name: Ada\ncity: London", "records": "A record.",
        "code": "def f():\n    return 1", "markdown": "A note.", "image": "Painted words",
    }  # fmt: skip
    assert by_kind.keys() <= set(KINDS)
    for kind in by_kind:
        assert [index.chunks[row].kind for row in index.rows_where(f'kind = "{kind}"')] == [kind]
    assert len(index.rows_where('kind in ("docx", "code") and source like "m*"')) == 2
    (docs / "n.txt").write_text("x")
    again = sync(docs, "lab", config, hash_embedder)
    assert again.change.to_embed == 1
    assert {c.id for c in index.chunks} < {c.id for c in open_index("lab", hash_embedder).chunks}
    assert {c.source: c.kind for c in open_index("lab", hash_embedder).chunks}["p.png"] == "image"


def test_a_term_that_can_be_linked_to_is_the_heading_of_its_definition() -> None:
    page = """<h1>Paths<a>¶</a></h1><dl><dt id="j">join(path, *paths)<a>¶</a></dt><dd>Joins paths.
    <dl><dt>Returns</dt><dd>a path</dd></dl><dl><dt id="m">join.fast()</dt><dd>Inner.</dd></dl>More of join.</dd>
    <dt><a id="a"></a>-a</dt><dt id="b">--all</dt><dd>Everything.</dd></dl><p>After.</p><h2>Next</h2>Last."""
    _, sections = markup.html(page.encode(), "page")
    assert [(s.path[1:], " ".join(s.text.split())) for s in sections if s.text] == [
        (("join(path, *paths)",), "join(path, *paths)¶ Joins paths. Returns a path"),
        (("join(path, *paths)", "join.fast()"), "join.fast() Inner."),
        (("join(path, *paths)",), "More of join."),
        (("-a",), "-a --all Everything."),
        ((), "After."),
        (("Next",), "Last."),
    ]
    assert sections[0].path == ("Paths",)
    long = f"<dl><dt id='x'>call({'argument, ' * 20})</dt><dd>A.</dd><dt id='y'>{'word ' * 30}</dt><dd>B.</dd></dl>"
    assert [s.path[1] for s in markup.html(long.encode(), "page")[1][1:3]] == ["call", "word " * 11 + "word"]


def test_terms_whose_ends_are_left_out_are_read_in_time() -> None:
    page = "<dl>" + "".join(f"<dt id=t{n}>term{n}<dd>Definition {n} that is short." for n in range(4000)) + "</dl>"
    began = time.perf_counter()
    _, sections = markup.html(page.encode(), "page")
    assert time.perf_counter() - began < 10
    assert [s.path[1] for s in sections[1:4]] == ["term0", "term1", "term2"]
