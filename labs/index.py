"""`llmlab index`: make an index say what a folder of documents says, and see before what that would change."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from pipelines.rag.embed import Embedder
    from pipelines.rag.index import Change, RagConfig

index_app = typer.Typer(no_args_is_help=True, help="Indexes of documents. Example: llmlab index sync ~/notes")

SHOWN = 20

Docs = Annotated[Path | None, typer.Argument(help="A folder of documents (text, web pages, PDF, Word, tables, records, code, "
                                             "pictures of text); labs/knowledge if not given.")]  # fmt: skip
Name = Annotated[str, typer.Option(help="Name of the index.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="A field of configs/rag/default.yaml, a.b=c.")]


@index_app.command()
def sync(
    docs: Docs = None,
    name: Name = "knowledge",
    set_: Overrides = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Who reads and embeds: this process, or workers of Ray.")
    ] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="Workers of Ray; one for each CPU if not given.")] = None,
) -> None:
    """Index what is new or changed in a folder, and forget what is gone. Example: llmlab index sync ~/notes.

    Large folders with many workers: llmlab index sync ~/notes --engine ray --workers 2 (after make setup-ray).
    """
    from labs.screen import CountScreen, json_line, say
    from pipelines.errors import ConfigError
    from pipelines.rag.index import sync as run_sync
    from pipelines.rag.scale import on_ray
    from pipelines.tune.data import KNOWLEDGE

    if workers and engine != "ray":
        raise ConfigError(f"--workers {workers} came without Ray", "--engine ray")
    config, embedder = _config(set_)
    with CountScreen() as screen, on_ray(embedder, config.embedder, workers) if engine == "ray" else nullcontext() as crew:
        report = run_sync(docs or KNOWLEDGE, name, config, embedder, screen.update, crew)
    for skipped in report.skipped:
        say(f"skipped {skipped.path}: {skipped.reason}")
    change = report.change
    say(f"index {name}: {report.chunks} chunks of {report.documents} documents; {change.to_embed} embedded, "
        f"{report.chunks - change.to_embed} reused, {change.gone_chunks} removed, {len(report.skipped)} files skipped, "
        f"in {report.seconds:.1f} s")  # fmt: skip
    say(f"search {report.vectors.kind}: {report.vectors.reason}")
    json_line({"index": name, "documents": report.documents, "chunks": report.chunks, "embedded": change.to_embed,
               "removed": change.gone_chunks, "vectors": report.vectors.kind, "skipped": len(report.skipped),
               "seconds": round(report.seconds, 2)})  # fmt: skip


@index_app.command()
def diff(docs: Docs = None, name: Name = "knowledge", set_: Overrides = None) -> None:
    """Show what sync would change, and change nothing. Example: llmlab index diff ~/notes."""
    from labs.screen import CountScreen, json_line, say
    from pipelines.rag.index import diff as compare
    from pipelines.tune.data import KNOWLEDGE

    config, embedder = _config(set_)
    with CountScreen() as screen:
        change = compare(docs or KNOWLEDGE, name, config, embedder, screen.update)
    for sign, sources in (("+", change.added), ("~", change.changed), ("-", change.deleted)):
        for source in sources[:SHOWN]:
            say(f"{sign} {source}")
        if len(sources) > SHOWN:
            say(f"{sign} and {len(sources) - SHOWN} more")
    say(_summary(change))
    json_line({"added": len(change.added), "changed": len(change.changed), "deleted": len(change.deleted),
               "unchanged": change.unchanged, "new_chunks": change.new_chunks, "gone_chunks": change.gone_chunks,
               "to_embed": change.to_embed})  # fmt: skip


@index_app.command()
def calibrate(
    name: Annotated[str, typer.Argument(help="The index.", metavar="NAME")],
    questions: Annotated[Path, typer.Option(help='JSON lines {"question": ..., "source": ...}; no source: nothing answers it.')],
    at_most: Annotated[float, typer.Option(min=0, max=0.5, help="Share of the answerable questions that may be refused.")] = 0.02,
    set_: Overrides = None,
) -> None:
    """Learn below which sign a question has no answer. Example: llmlab index calibrate notes --questions asked.jsonl."""
    from labs.screen import CountScreen, json_line, say
    from pipelines.rag.abstention import learn, save
    from pipelines.rag.asked import read_questions
    from pipelines.rag.index import open_index
    from pipelines.rag.retrieve import Retriever

    config, embedder = _config(set_)
    asked = read_questions(questions)
    retriever = Retriever(open_index(name, embedder, config.store), embedder, config)
    with CountScreen() as screen:
        found = learn(retriever, asked, at_most, lambda done, total: screen.update("ask", done, total))
    save(name, found)
    say(f"index {name}: a sign below {found.value:.3f} is no answer, as for {found.refused:.1%} of {found.answerable} questions "
        f"that have one and {found.caught:.1%} of {found.unanswerable} that have none (AUC {found.auc:.3f})")  # fmt: skip
    json_line({"index": name, "threshold": found.value, "refused": found.refused, "caught": found.caught,
               "answerable": found.answerable, "unanswerable": found.unanswerable, "auc": found.auc})  # fmt: skip


@index_app.command()
def fetch(
    urls: Annotated[list[str], typer.Argument(help="Addresses of pages: http or https.", metavar="URL")],
    into: Annotated[Path, typer.Option(help="The folder that gets them; index it with sync.")],
    allow: Annotated[list[str] | None, typer.Option(help="A host that may be asked, beside web_hosts; can be repeated.")] = None,
    set_: Overrides = None,
) -> None:
    """Copy web pages into a folder. Example: llmlab index fetch https://example.org/a --into notes --allow example.org."""
    from labs.screen import json_line, say
    from pipelines.config import load, named
    from pipelines.errors import ConfigError, DataError
    from pipelines.rag.index import RagConfig
    from pipelines.rag.web import NEXT
    from pipelines.rag.web import fetch as run_fetch

    hosts = [*load(named("rag", "default"), RagConfig, set_ or ()).web_hosts, *(allow or ())]
    fetched = []
    for url in urls:
        try:
            page = run_fetch(url, into, hosts)
        except (ConfigError, DataError) as error:
            say(f"not fetched: {error}")
        else:
            fetched.append(page)
            say(f"{page.url} -> {page.path} ({page.size} bytes)")
    json_line({"fetched": len(fetched), "failed": len(urls) - len(fetched), "files": [str(page.path) for page in fetched]})
    if len(fetched) < len(urls):
        raise DataError(f"{len(urls) - len(fetched)} of {len(urls)} pages were not fetched", "every page", NEXT)


@index_app.command(name="list")
def list_() -> None:
    """List the indexes. Example: llmlab index list."""
    from labs.screen import say, table
    from pipelines.rag import generation

    rows = []
    for name in generation.index_names():
        folder = generation.folder_of(name)
        manifest = generation.manifest_of(folder / (generation.current(folder) or ""))
        rows.append((name, str(manifest["documents"]), str(manifest["chunks"]), manifest["vectors"]["kind"],
                     manifest["config"]["embedder"], manifest["created"]))  # fmt: skip
    if rows:
        table("Indexes", ["index", "documents", "chunks", "search", "embedder", "made"], rows)
    else:
        say(f"no index yet; next: {generation.AGAIN}")


@index_app.command()
def embedders() -> None:
    """List what can make the vectors of an index, and which of it is on this machine. Example: llmlab index embedders."""
    from labs.screen import say, table
    from pipelines.config import names
    from pipelines.rag import embedders as catalogue

    entries, here = [catalogue.find(name) for name in names("embedders")], catalogue.here()
    rows = [(e.name, "yes" if e.name in here else "no", str(e.dimension), str(e.max_tokens), ", ".join(e.languages), e.licence,
             e.note) for e in entries]  # fmt: skip
    table("Embedders", ["embedder", "here", "dimensions", "most tokens", "languages", "licence", "note"], rows)
    say('next: make index DOCS=path/to/folder SET="embedder=NAME"; llmlab pull NAME fetches the weights of one that is not here')


@index_app.command()
def copy(
    name: Annotated[str, typer.Argument(help="Name of the index.")] = "knowledge",
    to: Annotated[str | None, typer.Option(help="URL of the store that gets the index.")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="URL of the store that the index is made of.")] = None,
    set_: Overrides = None,
) -> None:
    """Copy what is new to a vector store, or from one. Example: llmlab index copy knowledge --to qdrant:folder."""
    from labs.screen import CountScreen, json_line, say
    from pipelines.errors import ConfigError
    from pipelines.rag.stores.copying import copy_from, copy_to

    url = to or from_
    if not url or (to and from_):
        raise ConfigError(
            "a copy goes to a store or comes from one", "--to URL or --from URL", f"llmlab index copy {name} --to URL"
        )
    config, embedder = _config(set_)
    with CountScreen() as screen:
        copied = (copy_to if to else copy_from)(url, name, config, embedder, screen.update)
    way = f"{name} -> {url}" if to else f"{url} -> {name}"
    say(f"{way}: {copied.chunks} chunks, {copied.sent} sent, {copied.removed} removed, in {copied.seconds:.1f} s")
    json_line({"index": name, "store": url, "generation": copied.generation, "chunks": copied.chunks, "sent": copied.sent,
               "removed": copied.removed, "seconds": round(copied.seconds, 2)})  # fmt: skip


def _config(overrides: list[str] | None) -> tuple[RagConfig, Embedder]:
    from pipelines.config import load, named
    from pipelines.rag.embed import load_embedder
    from pipelines.rag.index import RagConfig

    config = load(named("rag", "default"), RagConfig, overrides or ())
    return config, load_embedder(config.embedder)


def _summary(change: Change) -> str:
    documents = f"{len(change.added)} documents added, {len(change.changed)} changed, {len(change.deleted)} deleted"
    chunks = f"{change.new_chunks} chunks new, {change.gone_chunks} gone, {change.to_embed} passages to embed"
    return f"{documents}, {change.unchanged} as they were; {chunks}"
