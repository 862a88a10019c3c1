"""Broken files: whatever the bytes, a reader ends soon, with a document or a reason. Nothing else comes out of `load`."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import docx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from reportlab.pdfgen.canvas import Canvas

from pipelines.errors import DataError
from pipelines.rag.load import _READERS, load
from pipelines.rag.readers import image

SUFFIXES = sorted({reader: suffix for suffix, (_, reader) in _READERS.items()}.values())  # one for each reader
FEW = settings(max_examples=60, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """OCR itself takes half a second; what is broken here is the file around the pixels."""
    monkeypatch.setattr(image, "_engine", lambda: lambda _: type("Found", (), {"boxes": None, "txts": ("x",)})())


def sample(suffix: str) -> bytes:
    buffer = io.BytesIO()
    if suffix == ".docx":
        document = docx.Document()
        document.add_heading("Title", 1)
        document.add_paragraph("Some text.")
        document.add_table(2, 2).cell(0, 0).text = "cell"
        document.save(buffer)
    elif suffix == ".pdf":
        canvas = Canvas(buffer)
        canvas.drawString(72, 700, "Some text.")
        canvas.showPage()
        canvas.drawInlineImage(Image.new("RGB", (20, 20), "red"), 0, 0)
        canvas.drawImage(canvas_picture(), 0, 0)
        canvas.showPage()
        canvas.save()
    elif _READERS[suffix][0] == "image":
        picture = Image.new("RGB", (60, 40), "white")
        ImageDraw.Draw(picture).text((5, 5), "text", fill="black")
        picture.save(buffer, "TIFF" if suffix.startswith(".tif") else "WEBP" if suffix == ".webp" else "PNG")
    else:
        buffer.write(TEXTS[_READERS[suffix][0]].encode())
    return buffer.getvalue()


def canvas_picture() -> object:
    from reportlab.lib.utils import ImageReader

    return ImageReader(Image.new("RGB", (30, 30), "blue"))


TEXTS = {
    "markdown": "---\ntitle: T\n---\n# One\n\n- a\n- b\n\n> # quoted\n\n```py\nx\n```\n[a](b)\n",
    "text": "Plain words.\n\nMore of them.\n",
    "html": "<html><head><title>T</title></head><body><h1>A</h1><p>b<br>c</p><table><tr><td>d</td></tr></table></body></html>",
    "table": 'name,city,"note"\nAda,London,"a ""b"" c"\nBo,Oslo,d\n',
    "records": json.dumps({"a": [{"title": "b", "text": "c"}, {"d": {"e": [1, 2.5, None, True]}}], "f": "g"}),
    "code": "import x\n\n\n@y\nclass A(B):\n    def c(self, d):\n        return f'{d}'\n\n\nif x:\n    pass\n",
}


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str, bytes], None]:
    """Return what loads one file beside a good one."""
    (tmp_path / "good.txt").write_text("good")

    def one(suffix: str, content: bytes) -> None:
        (tmp_path / f"bad{suffix}").write_bytes(content)
        documents, skipped = load(tmp_path)
        assert len(documents) + len(skipped) == 2
        for document in documents:
            assert document.sections
            for section in document.sections:
                assert section.text.strip() and all(section.path)
                "".join((*section.path, section.text)).encode()
        assert all(s.reason for s in skipped)

    return one


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Flip bits, cut, insert, repeat."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(made) - 1, 0)))
        match draw(st.sampled_from(["flip", "cut", "insert", "drop", "repeat"])):
            case "flip" if made:
                made[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del made[at:]
            case "insert":
                made[at:at] = draw(st.binary(max_size=20))
            case "drop":
                del made[at : at + draw(st.integers(1, 200))]
            case _:
                made[at:at] = made[at : at + 100] * draw(st.integers(1, 5))
    return bytes(made)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_file_is_read_or_left_out(suffix: str, read: Callable[[str, bytes], None]) -> None:
    content = sample(suffix)
    read(suffix, content)

    @FEW
    @given(damaged(content))
    def check(bad: bytes) -> None:
        read(suffix, bad)

    check()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_bytes_are_read_or_left_out(suffix: str, read: Callable[[str, bytes], None]) -> None:
    @FEW
    @given(st.one_of(st.binary(max_size=400), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))))
    def check(content: bytes) -> None:
        read(suffix, content)

    check()


@pytest.mark.filterwarnings("ignore")
def test_damaged_xml_inside_a_whole_word_document_is_read_or_left_out(read: Callable[[str, bytes], None]) -> None:
    with zipfile.ZipFile(io.BytesIO(sample(".docx"))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    @FEW
    @given(damaged(members["word/document.xml"]))
    def check(xml: bytes) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in (members | {"word/document.xml": xml}).items():
                archive.writestr(name, content)
        read(".docx", buffer.getvalue())

    check()


MARKS = "#>*_`[]()!<&-+ \t\n|\\~='\"/{}:,;.$@0aé\u2028\x0b\x0c"


@pytest.mark.parametrize("suffix", [".md", ".html", ".csv", ".json", ".py", ".js"])
def test_any_text_of_marks_is_read_or_left_out(suffix: str, read: Callable[[str, bytes], None]) -> None:
    @FEW
    @given(st.text(MARKS, max_size=300))
    def check(text: str) -> None:
        read(suffix, text.encode())

    check()


# Each takes minutes by the square of its size where a parser tries again at every mark.
SLOW = {
    "open tags": (".html", "<a " * 50_000),
    "open tags, an end inside quotes": (".html", "<a " * 20_000 + 'b=">"'),
    "open comments": (".html", "<!--" * 50_000),
    "open quotes": (".html", '<a b="' * 50_000),
    "paragraphs side by side": (".html", "<p>a" * 50_000),
    "headings inside each other": (".html", "<h2>a" * 5_000),
    "elements inside each other": (".html", "<b>" * 30_000 + "a"),
    "quotations inside each other": (".md", ">" * 5_000 + "a"),
    "brackets": (".md", "[" * 10_000),
    "emphasis": (".md", "*a_ " * 5_000),
    "code marks": (".md", " ".join("`" * n for n in range(1, 400))),
    "quotes": (".csv", '"a""' * 50_000),
    "lists inside each other": (".json", "[" * 200_000),
    "brackets of Python": (".py", "(" * 10_000),
    "a long sum": (".py", "+".join("a" * 9_000)),
    "words that look like types": (".c", "\n\n".join(["a " * 140] * 1_000)),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", SLOW)
def test_what_is_made_to_be_slow_is_not(name: str, tmp_path: Path) -> None:
    suffix, text = SLOW[name]
    (tmp_path / f"slow{suffix}").write_text(text)
    try:
        load(tmp_path)
    except DataError as error:
        assert "skipped" in error.came
