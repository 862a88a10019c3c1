"""The big corpus of the bench of retrieval, on a small one of the same shape: which pages, which questions, which answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from labs.bench import rag, rag_corpus
from labs.bench.rag_corpus import corpus_folder, part_of, read_corpus
from labs.bench.rag_questions import Posed, plain, posed, questions_of
from labs.bench.rag_sets import scores
from pipelines.errors import DataError

SPHINX = """<!DOCTYPE html><html><head><title>os.path — Common pathname manipulations — Python 3.11 documentation</title></head>
<body><div class="related" role="navigation"><h3>Navigation</h3><ul><li>index of everything, with many more words than these,
so many that they would count as the text of a section if anyone read them, which nobody should</li></ul></div>
<div class="body" role="main"><section><h1>os.path — Common pathname manipulations<a class="headerlink">¶</a></h1>
<p>This module implements some useful functions on pathnames. To read or write files see open(), and for accessing the
filesystem see the os module. The path parameters can be passed as strings, or bytes.</p>
<dl class="py function"><dt class="sig sig-object py" id="os.path.join"><span class="sig-prename">os.path.</span>
<span>join</span>(<em>path</em>, <em>*paths</em>)<a class="headerlink">¶</a></dt><dd>
<p>Join one or more path segments intelligently.  The return value is
the concatenation of <em>path</em> and all members of <em>*paths</em>.</p></dd></dl>
<dl class="py data"><dt class="sig sig-object py" id="os.path.sep"><span>sep</span></dt><dd><p>The character used by the
operating system to separate pathname components.</p></dd></dl>
<section><h2>Opening a pathname twice<a class="headerlink">¶</a></h2><p>Nothing good comes of it, since both of those who opened
it believe that it is theirs alone, and whatever one of them writes the other one overwrites without a word.</p></section>
</section></div></body></html>"""
DOCBOOK = """<html><head><title>CREATE INDEX</title></head><body><div class="navheader"><table><tr><th>CREATE
INDEX</th></tr></table></div><div class="refentry"><div class="refnamediv">
<h2><span class="refentrytitle">CREATE INDEX</span></h2>
<p>CREATE INDEX — define a new index</p></div><div class="refsect1"><h2>2.1. Index Storage Parameters</h2>
<p>The optional clause specifies what is kept and how, and each method of an index has a set of its own that is allowed, so that
one has to look at those of the method that is used before any of them is written down.</p>
<dl class="variablelist"><dt><span class="term"><code>CONCURRENTLY</code></span></dt><dd><p>When this option is used,
the index is built without taking any locks that prevent concurrent inserts.</p></dd>
<dt><span class="term"><code>-d</code><br /><code>--dbname</code></span></dt><dd><p>Specifies the name of the
database that the index is made in, or else another one.</p></dd></dl></div></div></body></html>"""
ASCIIDOC = """<html><head><title>git-commit(1)</title></head><body class="manpage"><div id="header"><h1>git-commit(1) Manual
Page</h1><h2>NAME</h2><div class="sectionbody"><p>git-commit -
   Record changes to the repository
</p></div></div><div class="sect1"><h2>OPTIONS</h2><div class="dlist"><dl><dt class="hdlist1">-C &lt;commit&gt;</dt>
<dt class="hdlist1">--reuse-message=&lt;commit&gt;</dt><dd><p>Take an existing commit object, and reuse the log message and the
authorship information.</p></dd><dt class="hdlist1">commit.gpgSign</dt><dd><p>A boolean to say whether all of the commits should
be signed.</p></dd></dl></div></div></body></html>"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Return a folder that holds a page or two of each package, and pages that are not read."""
    folder = tmp_path / "doc"
    pages = {
        "python3.11/html/library/os.path.html": SPHINX, "python3.11/html/genindex-A.html": SPHINX,
        "python3.11/html/index.html": "<h1>Python</h1><p>Parts of the documentation.</p>",
        "python3.11/html/whatsnew/3.9.html": SPHINX, "postgresql-doc-15/html/sql-createindex.html": DOCBOOK,
        "postgresql-doc-15/html/release-15-1.html": DOCBOOK, "git-doc/git-commit.html": ASCIIDOC,
    }  # fmt: skip
    for name, text in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "git-doc" / "index.html").symlink_to("git-commit.html")
    return folder


def asked(page: str) -> set[tuple[str, str, str]]:
    return {(q.kind.removeprefix("docs_"), q.text, q.mark) for q in questions_of("page.html", page)}


def test_questions_are_made_of_headings_definitions_and_purposes() -> None:
    join = "Join one or more path segments intelligently. Th"
    assert asked(SPHINX) == {
        ("headings", "What is there to know about common pathname manipulations?", "os.path — Common pathname manipulations"),
        ("headings", "How does opening a pathname twice work?", "Opening a pathname twice"),
        ("definitions", "What does os.path.join do?", join),
        ("purposes", "How can I join one or more path segments intelligently?", join),
        ("definitions", "What is os.path.sep?", "The character used by the operating system to se"),
    }
    assert asked(DOCBOOK) == {
        ("headings", "What is there to know about index Storage Parameters?", "Index Storage Parameters"),
        ("definitions", "What does CONCURRENTLY mean in CREATE INDEX?", "When this option is used, the index is built wit"),
        ("definitions", "What does --dbname mean in CREATE INDEX?", "Specifies the name of the database that the inde"),
        ("purposes", "How can I specify the name of the database that the index is made in?",
         "Specifies the name of the database that the inde"),
        ("purposes", "Which command is there to define a new index?", "CREATE INDEX — define a new index"),
    }  # fmt: skip
    assert asked(ASCIIDOC) == {
        ("definitions", "What does --reuse-message mean in git commit?", "Take an existing commit object, and reuse the lo"),
        ("definitions", "What does commit.gpgSign do?", "A boolean to say whether all of the commits shou"),
        ("purposes", "Which command is there to record changes to the repository?",
         "git-commit - Record changes to the repository"),
    }  # fmt: skip


def test_what_two_places_answer_is_not_asked() -> None:
    twice = posed([("a.html", SPHINX), ("b.html", SPHINX.replace("Opening a pathname twice", "Closing a pathname twice"))])
    assert {q.text for q in twice} == {"How does opening a pathname twice work?", "How does closing a pathname twice work?"}


def test_a_heading_is_known_without_its_number() -> None:
    for heading in ("20.5.1. Settings¶", "Chapter 20. Settings", "F.3. Settings", "Settings", " Settings\n¶"):
        assert plain(heading) == "Settings"


def test_a_corpus_is_indexed_once_and_every_answer_is_found(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rag_corpus, "EMBEDDER", "minilm")
    kept = tmp_path / "kept"
    corpus = read_corpus(packages, kept, "minilm-int8", lambda *_: None)
    assert corpus.facts["pages"] == 4 and corpus.facts["embedded"] == corpus.facts["chunks"] > 10
    assert corpus.facts["questions_possible"] == 13 and corpus.facts["answers_in_no_chunk"] == 0
    assert [s.name for s in corpus.sets] == [f"{kind}_{part}" for kind in rag.KINDS for part in ("dev", "test")]
    assert sum(len(s.questions) for s in corpus.sets) == 13
    for some in corpus.sets:
        for question in some.questions:
            holding = {c.source for c in some.retriever.index.chunks if some.key(c) in question.right}
            assert len(holding) == 1 and some.name.endswith(part_of(holding.pop()))
        if some.questions:
            assert scores(some, None)["recall_at_10"] == pytest.approx(1)
    page = packages / "git-doc" / "git-commit.html"
    page.write_text(ASCIIDOC.replace("all of the commits should", "all of the commits must"))
    (packages / "python3.11" / "html" / "index.html").unlink()
    again = read_corpus(packages, kept, "minilm-int8", lambda *_: None)
    assert (again.facts["pages"], again.facts["embedded"]) == (3, 1)


def test_an_answer_that_no_chunk_holds_is_counted(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rag_corpus, "EMBEDDER", "minilm")
    lost = [Posed("docs_definitions", "What does git frobnicate?", "git-doc/git-commit.html", "Frobnicates everything")]
    monkeypatch.setattr(rag_corpus, "posed", lambda pages: posed(pages) + lost)
    assert read_corpus(packages, tmp_path / "kept", "minilm-int8", lambda *_: None).facts["answers_in_no_chunk"] == 1


def test_where_the_packages_are(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMLAB_CORPUS", raising=False)
    monkeypatch.setattr(rag_corpus, "DEFAULT_FOLDER", tmp_path / "nowhere")
    assert corpus_folder(None) is None
    assert corpus_folder(packages) == packages
    monkeypatch.setenv("LLMLAB_CORPUS", str(packages))
    assert corpus_folder(None) == packages
    with pytest.raises(DataError, match=r"lacks the pages of python3.11-doc, postgresql-doc-15, git-doc") as raised:
        corpus_folder(tmp_path)
    assert raised.value.next_command == "apt-get install python3.11-doc postgresql-doc-15 git-doc"


def test_what_was_left_out_is_told_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labs.bench.rag_langchain.is_here", lambda: False)
    assert rag._left_out(corpus=True) == {
        "docs_headings, docs_definitions, docs_purposes":
            "without --quick, after apt-get install python3.11-doc postgresql-doc-15 git-doc",
        "retrieve_ratio_to_langchain": "make setup-chains",
    }  # fmt: skip
    monkeypatch.setattr("labs.bench.rag_langchain.is_here", lambda: True)
    assert rag._left_out(corpus=False) == {}
