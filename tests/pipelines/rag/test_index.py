"""The index: exact search, re-use of vectors, and that nothing interrupts the generation that serves."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipelines.config import ROOT, load, names
from pipelines.config import named as config_path
from pipelines.errors import ConfigError, DataError, FingerprintMismatch, RunIncomplete, UnknownName
from pipelines.rag import index, workers
from pipelines.rag.chunk import chunk
from pipelines.rag.embed import Embedder
from pipelines.rag.generation import FORMAT, index_names
from pipelines.rag.index import Index, RagConfig, diff, open_index, sync

CONFTEST = Path(__file__).with_name("conftest.py")


def generations(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def texts(index: Index) -> set[str]:
    return {c.text for c in index.chunks}


def run_python(code: str, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    prelude = (
        "import os, runpy, signal, sys\nfrom pathlib import Path\n"
        f"HashEmbedder = runpy.run_path({str(CONFTEST)!r})['HashEmbedder']\n"
        "from pipelines.config import load, named\nfrom pipelines.rag.index import RagConfig, open_index, sync\n"
        "config = load(named('rag', 'default'), RagConfig, ['chunk_max_tokens=48'])\n"
    )
    command = [*before, sys.executable, "-c", prelude + code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_every_configuration_is_valid() -> None:
    assert names("rag") == ["default"]
    default = load(config_path("rag", "default"), RagConfig)
    assert (default.chunk_max_tokens, default.top_k) == (96, 3)
    with pytest.raises(ConfigError, match="chunk_max_tokens"):
        load(config_path("rag", "default"), RagConfig, ["chunk_max_tokens=257"])


def test_search_equals_brute_force(docs: Path, config: RagConfig, minilm: Embedder) -> None:
    sync(docs, "lab", config, minilm)
    index = open_index("lab", minilm)
    matrix = minilm.embed([c.passage for c in index.chunks])
    np.testing.assert_allclose(index.vectors.rows, matrix, atol=1e-5)
    for question in ("Which licence does Falcon have?", "What draws dashboards?", "zzz"):
        vector = minilm.embed([question])[0]
        scores = matrix @ vector
        best = np.argsort(-scores)[:4]
        found = index.nearest(vector, 4)
        assert found.rows.tolist() == best.tolist()
        np.testing.assert_allclose(found.scores, scores[best], atol=1e-5)
    assert len(index.nearest(vector, 50).rows) == len(index) == 7


def test_the_files_are_plain_numpy_safetensors_and_sqlite(
    docs: Path, config: RagConfig, hash_embedder: Any, index_folder: Path
) -> None:
    report = sync(docs, "lab", config, hash_embedder)
    folder = index_folder / "lab" / report.generation
    assert np.load(folder / "vectors.npy", allow_pickle=False).shape == (report.chunks, 64)
    assert int(load_file(folder / "words.safetensors")["passages"][0]) == report.chunks
    (count,) = sqlite3.connect(folder / "chunks.sqlite").execute("SELECT count(*) FROM chunks").fetchone()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert count == report.chunks == manifest["chunks"]
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_a_second_build_embeds_nothing_and_keeps_ids_and_vectors(
    docs: Path, config: RagConfig, hash_embedder: Any, index_folder: Path
) -> None:
    first = sync(docs, "lab", config, hash_embedder)
    before = open_index("lab", hash_embedder)
    second = sync(docs, "lab", config, hash_embedder)
    after = open_index("lab", hash_embedder)
    assert (first.change.to_embed, first.change.new_chunks, first.change.gone_chunks) == (7, 7, 0)
    assert (second.change.to_embed, second.change.new_chunks, second.change.gone_chunks) == (0, 0, 0)
    assert len(hash_embedder.embedded) == 7
    assert before.chunks == after.chunks
    np.testing.assert_array_equal(before.vectors.rows, after.vectors.rows)
    assert before.generation != after.generation == second.generation
    sync(docs, "lab", config, hash_embedder)
    assert len(generations(index_folder / "lab")) == 2
    assert index_names() == ["lab"]


def test_changed_removed_and_doubled_files(docs: Path, config: RagConfig, hash_embedder: Any) -> None:
    sync(docs, "lab", config, hash_embedder)
    (docs / "falcon.md").unlink()
    (docs / "claude-2.md").write_text((docs / "claude-2.md").read_text().replace("100K", "200K"))
    (docs / "copy.txt").write_text("The same words.")
    (docs / "deep" / "copy.txt").write_text("The same words.")
    hash_embedder.embedded.clear()
    report = sync(docs, "lab", config, hash_embedder)
    index = open_index("lab", hash_embedder)
    assert sorted(hash_embedder.embedded) == [
        "Claude 2 > Context: Claude 2 accepts 200K tokens of context.",
        "copy: The same words.",
    ]
    assert (report.documents, report.change.to_embed, report.change.gone_chunks) == (5, 2, 3)
    assert {c.source for c in index.chunks} == {"cache.txt", "claude-2.md", "copy.txt", "deep/copy.txt", "deep/monitor.html"}
    np.testing.assert_array_equal(index.vectors.rows, hash_embedder.embed([c.passage for c in index.chunks]))


def test_a_diff_tells_what_a_sync_would_do_and_changes_nothing(docs: Path, config: RagConfig, hash_embedder: Any) -> None:
    everything = diff(docs, "lab", config, hash_embedder)
    assert everything == sync(docs, "lab", config, hash_embedder).change
    assert len(everything.added) == 4 and everything.unchanged == 0 and everything.to_embed == 7
    before = open_index("lab", hash_embedder)
    (docs / "falcon.md").unlink()
    (docs / "claude-2.md").write_text((docs / "claude-2.md").read_text().replace("100K", "200K"))
    (docs / "new.txt").write_text("Something new.")
    found = diff(docs, "lab", config, hash_embedder)
    assert (found.added, found.changed, found.deleted, found.unchanged) == (("new.txt",), ("claude-2.md",), ("falcon.md",), 2)
    assert (found.new_chunks, found.gone_chunks, found.to_embed) == (2, 3, 2)
    assert open_index("lab", hash_embedder).generation == before.generation
    assert sync(docs, "lab", config, hash_embedder).change == found
    assert diff(docs, "lab", config, hash_embedder).unchanged == 4


def test_documents_are_cut_again_when_what_cuts_them_has_changed(
    docs: Path, config: RagConfig, hash_embedder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync(docs, "lab", config, hash_embedder)
    smaller = config.model_copy(update={"chunk_max_tokens": 32})
    (docs / "long.txt").write_text("A sentence of eight words stands here now. " * 12)
    sync(docs, "lab", config, hash_embedder)
    sync(docs, "lab", smaller, hash_embedder)
    sync(docs, "fresh", smaller, hash_embedder)
    assert open_index("lab", hash_embedder).chunks == open_index("fresh", hash_embedder).chunks
    monkeypatch.setattr(index, "READERS_VERSION", 0)
    calls: list[str] = []
    monkeypatch.setattr(workers, "chunk", lambda d, *rest: calls.append(d.source) or chunk(d, *rest))
    sync(docs, "lab", smaller, hash_embedder)
    assert len(calls) == 5
    sync(docs, "lab", smaller, hash_embedder)
    assert len(calls) == 5


def test_skipped_files_are_in_the_report_and_the_manifest(docs: Path, config: RagConfig, hash_embedder: Any) -> None:
    (docs / "empty.md").touch()
    report = sync(docs, "lab", config, hash_embedder)
    assert [(s.path, s.reason) for s in report.skipped] == [("empty.md", "0 bytes")]
    manifest = open_index("lab", hash_embedder).manifest
    assert manifest["skipped"] == [{"path": "empty.md", "reason": "0 bytes", "sha256": ""}]
    assert (manifest["docs"], manifest["documents"], manifest["dimension"]) == ("docs", 4, 64)


def test_another_embedders_index_is_refused_and_can_be_built_anew(
    docs: Path, config: RagConfig, hash_embedder: Any, other_embedder: Any
) -> None:
    sync(docs, "lab", config, hash_embedder)
    with pytest.raises(FingerprintMismatch) as raised:
        open_index("lab", other_embedder)
    assert "f" * 12 in raised.value.came and "0" * 12 in raised.value.expected and "make index" in raised.value.next_command
    assert sync(docs, "lab", config, other_embedder).change.to_embed == 7
    open_index("lab", other_embedder)


def test_a_missing_index_and_a_bad_name(docs: Path, config: RagConfig, hash_embedder: Any) -> None:
    with pytest.raises(UnknownName, match="none yet"):
        open_index("lab", hash_embedder)
    sync(docs, "lab", config, hash_embedder)
    with pytest.raises(UnknownName, match="one of lab") as raised:
        open_index("lap", hash_embedder)
    assert "make index" in raised.value.next_command
    for name in ("../lab", "Lab", "", "-a", "a/b", "lab\n"):
        with pytest.raises(ConfigError, match="cannot name an index"):
            sync(docs, name, config, hash_embedder)


def test_an_empty_corpus_leaves_the_index_as_it_was(docs: Path, config: RagConfig, hash_embedder: Any, tmp_path: Path) -> None:
    sync(docs, "lab", config, hash_embedder)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no readable document"):
        sync(tmp_path / "none", "lab", config, hash_embedder)
    assert len(open_index("lab", hash_embedder)) == 7


def test_a_chunk_limit_above_the_embedders_is_an_error(docs: Path, config: RagConfig, hash_embedder: Any) -> None:
    hash_embedder.max_tokens = 40
    with pytest.raises(ConfigError, match="at most 40"):
        sync(docs, "lab", config, hash_embedder)


def damage_vectors(generation: Path) -> None:
    content = bytearray((generation / "vectors.npy").read_bytes())
    content[-1] ^= 1
    (generation / "vectors.npy").write_bytes(content)


def change_format(generation: Path) -> None:
    text = (generation / "manifest.json").read_text()
    (generation / "manifest.json").write_text(text.replace(f'"format": {FORMAT}', '"format": 1'))


@pytest.mark.parametrize(
    "damage",
    [
        damage_vectors,
        change_format,
        lambda generation: (generation / "chunks.sqlite").unlink(),
        lambda generation: (generation / "manifest.json").unlink(),
        lambda generation: (generation / "manifest.json").write_text("{"),
    ],
)
def test_a_damaged_generation_is_refused_and_built_anew(
    docs: Path, config: RagConfig, hash_embedder: Any, index_folder: Path, damage: Callable[[Path], None]
) -> None:
    damage(index_folder / "lab" / sync(docs, "lab", config, hash_embedder).generation)
    with pytest.raises(RunIncomplete) as raised:
        open_index("lab", hash_embedder)
    assert "make index" in raised.value.next_command
    assert sync(docs, "lab", config, hash_embedder).change.to_embed == 7
    assert len(open_index("lab", hash_embedder)) == 7


def test_two_builds_at_once_are_refused(docs: Path, config: RagConfig, hash_embedder: Any, index_folder: Path) -> None:
    sync(docs, "lab", config, hash_embedder)
    with (index_folder / "lab" / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process"):
            sync(docs, "lab", config, hash_embedder)
    sync(docs, "lab", config, hash_embedder)


STEPS = ("chunk 4", "embed 1", "index 1", "write vectors.npy 0", "write words.safetensors 1", "write chunks.sqlite 2",
         "write manifest.json 3", "switch 0", "switch 1")  # fmt: skip


def test_the_steps_at_which_a_build_is_killed_are_all_there_are(docs: Path, config: RagConfig, hash_embedder: Any) -> None:
    seen: list[str] = []
    sync(docs, "lab", config, hash_embedder, lambda step, done, _: seen.append(f"{step} {done}"))
    assert set(STEPS) <= set(seen)
    assert {step.rpartition(" ")[0] for step in seen} == {step.rpartition(" ")[0] for step in STEPS}


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_build_leaves_an_index_that_opens(
    docs: Path, config: RagConfig, hash_embedder: Any, index_folder: Path, step: str
) -> None:
    for _ in range(2):
        sync(docs, "lab", config, hash_embedder)
    old = texts(open_index("lab", hash_embedder))
    (docs / "cache.txt").write_text("Something else about the cache.")
    code = (
        "def die(step, done, total):\n"
        "    if f'{step} {done}' == sys.argv[2]:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "sync(Path(sys.argv[1]), 'lab', config, HashEmbedder(), die)\n"
    )
    assert run_python(code, str(docs), step).returncode == -signal.SIGKILL
    changed = "Something else about the cache." in texts(open_index("lab", hash_embedder))
    assert changed == (step == "switch 1")
    assert changed or texts(open_index("lab", hash_embedder)) == old

    unfinished: list[Path] = []

    def look(*_: object) -> None:
        unfinished.extend(p for p in (index_folder / "lab").iterdir() if p.is_dir() and not (p / "manifest.json").exists())

    report = sync(docs, "lab", config, hash_embedder, lambda s, *_: look() if s in ("chunk", "embed") else None)
    assert not unfinished
    assert "Something else about the cache." in texts(open_index("lab", hash_embedder))
    assert report.generation in generations(index_folder / "lab") and len(generations(index_folder / "lab")) == 2


def test_a_full_disk_is_explained_and_the_index_goes_on(docs: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    code = (
        "from pipelines.errors import DiskFull\n"
        "os.environ['LLMLAB_INDEX'] = sys.argv[2]\n"
        "sync(Path(sys.argv[1]), 'lab', config, HashEmbedder())\n"
        "Path(sys.argv[1], 'large.txt').write_text('\\n\\n'.join(f'{n} ' * 40 for n in range(2000)))\n"
        "try:\n"
        "    sync(Path(sys.argv[1]), 'lab', config, HashEmbedder())\n"
        "except DiskFull as error:\n"
        "    print(error)\n"
        "print(len(open_index('lab', HashEmbedder())), len([p for p in Path(sys.argv[2], 'lab').iterdir() if p.is_dir()]))\n"
    )
    mount = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=400k none "$0" && exec "$@"', str(small))
    try:
        subprocess.run([*mount, "true"], check=True, capture_output=True, cwd=os.sep)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a small file system")
    done = run_python(code, str(docs), str(small), before=mount)
    assert done.returncode == 0, done.stderr
    assert "no space left" in done.stdout
    assert done.stdout.splitlines()[-1] == "7 1"
