"""Rerankers against a second way to compute the same, and what they do to a ranking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.errors import ConfigError, UnknownName, WeightsMissing
from pipelines.rag import embedders, rerank
from pipelines.rag.embed import Embedder
from pipelines.rag.index import RagConfig, open_index, sync
from pipelines.rag.lexical import Lexical
from pipelines.rag.rerank import CrossEncoder, MaxSim, blended, load_reranker
from pipelines.rag.retrieve import Retriever

MINILM = embedders.folder_of(embedders.find("minilm"))
PASSAGES = [
    "Falcon 40B comes from TII in Abu Dhabi. The licence is Apache 2.0.",
    "Claude 2 was launched by Anthropic in July 2023.",
    "Grafana draws dashboards.",
]
QUESTION = "Who launched Claude 2, dear tokenizer?"


@pytest.fixture(scope="module")
def words() -> Lexical:
    return Lexical.of(PASSAGES, "english")


@pytest.fixture(scope="module")
def maxsim() -> MaxSim:
    return MaxSim(MINILM, 256)


def test_maxsim_is_the_weighed_mean_of_the_nearest_tokens(maxsim: MaxSim, words: Lexical) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    model = AutoModel.from_pretrained(MINILM).eval()

    def states(text: str) -> torch.Tensor:
        with torch.inference_mode():
            found = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return found / found.norm(dim=1, keepdim=True)

    asked = states(QUESTION)[1:-1]
    pieces = tokenizer.tokenize(QUESTION)
    assert pieces[-3:] == ["token", "##izer", "?"]
    holders = {"who": 0, "launched": 1, "claude": 1, "2": 2, ",": None, "dear": 0, "token": 0, "##izer": 0, "?": None}
    weights = [0.0 if (d := holders[p]) is None else float(np.log(1 + (3 - d + 0.5) / (d + 0.5))) for p in pieces]
    expected = [
        sum(w * max(float(a @ b) for b in states(passage)) for w, a in zip(weights, asked, strict=True)) / sum(weights)
        for passage in PASSAGES
    ]
    assert np.allclose(maxsim.scores(QUESTION, PASSAGES, words), expected, atol=2e-3)  # kept in 16 bits
    assert int(np.argmax(expected)) == 1


def test_passages_of_late_are_kept_and_no_more(maxsim: MaxSim, words: Lexical, monkeypatch: pytest.MonkeyPatch) -> None:
    first = maxsim.scores(QUESTION, PASSAGES, words)
    runs: list[int] = []
    original = maxsim._run
    monkeypatch.setattr(maxsim, "_run", lambda tokens: runs.append(len(tokens)) or original(tokens))
    assert np.array_equal(maxsim.scores(QUESTION, PASSAGES, words), first) and runs == [1, 0]
    monkeypatch.setattr(rerank, "KEPT_PASSAGES", 2)
    assert np.array_equal(maxsim.scores(QUESTION, [*PASSAGES, "One more."], words)[:3], first)
    assert len(maxsim._states) == 2


def test_a_question_of_signs_and_a_long_passage_are_no_trouble(maxsim: MaxSim, words: Lexical) -> None:
    assert np.isfinite(maxsim.scores("??", PASSAGES, words)).all()
    assert maxsim.scores(QUESTION, ["word " * 2000], words).shape == (1,)
    assert maxsim.scores(QUESTION, [], words).shape == (0,)


def test_a_cross_encoder_reads_question_and_passage_together(tmp_path: Path, words: Lexical) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=1, **size)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    passages = [*PASSAGES, "word " * 300]
    expected = []
    for passage in passages:
        pair = tokenizer(QUESTION, passage)["input_ids"]
        ids = torch.tensor([[*pair[:63], pair[-1]] if len(pair) > 64 else pair])
        kinds = torch.tensor([[0 if place <= pair.index(102) else 1 for place in range(ids.shape[1])]])
        with torch.inference_mode():
            expected.append(float(torch.sigmoid(model(ids, token_type_ids=kinds).logits[0, 0])))
    assert np.allclose(CrossEncoder(tmp_path, 64).scores(QUESTION, passages, words), expected, atol=1e-5)
    assert np.isfinite(CrossEncoder(tmp_path, 64).scores("long " * 200, passages, words)).all()
    model.half().save_pretrained(tmp_path)
    assert np.allclose(CrossEncoder(tmp_path, 64).scores(QUESTION, passages, words), expected, atol=1e-2)


def test_a_blend_keeps_either_order_at_its_ends() -> None:
    before, told = np.array([0.9, 0.6, 0.3]), np.array([0.1, 0.2, 0.4])
    assert np.allclose(blended(before, told, 0.0), [1, 2 / 3, 1 / 3])
    assert np.allclose(blended(before, told, 1.0), [0.25, 0.5, 1.0])
    assert np.array_equal(blended(np.zeros(2), np.zeros(2), 0.5), [0, 0])


def test_a_reranked_search_finds_what_the_others_do_in_its_own_order(docs: Path, config: RagConfig, minilm: Embedder) -> None:
    sync(docs, "lab", config, minilm)
    plain = Retriever(open_index("lab", minilm), minilm, config)
    first = replace(plain, reranker=load_reranker("maxsim"))
    question = "Who launched Claude 2?"
    assert first.retrieve(question, 1).hits[0].text.startswith("Anthropic launched")
    some, others = plain.retrieve(question, 50).hits, first.retrieve(question, 50).hits
    assert {h.chunk_id for h in some} == {h.chunk_id for h in others} and len(some) == len(others)
    scores = [h.score for h in others]
    assert scores == sorted(scores, reverse=True) and scores[0] <= 1.0
    assert first.retrieve(question, 2, 'source = "falcon.md"').hits[0].source == "falcon.md"


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    size = {"vocab_size": 30522, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(ConfigError, match="holds no cross-encoder"):
        CrossEncoder(tmp_path, 64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MINILM / name).read_bytes())
    BertModel(BertConfig(**size, num_labels=1)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="lacks . of its weights"):
        CrossEncoder(tmp_path, 64)
    BertForSequenceClassification(BertConfig(**size, num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has 3 outputs"):
        CrossEncoder(tmp_path, 64)


def test_an_unknown_reranker_and_one_without_weights_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_reranker("none") is None
    with pytest.raises(UnknownName, match="maxsimm"):
        load_reranker("maxsimm")
    monkeypatch.setenv("LLMLAB_MODELS", str(tmp_path))
    with pytest.raises(WeightsMissing) as raised:
        load_reranker("ms-marco-minilm")
    assert "llmlab pull ms-marco-minilm" in raised.value.next_command
