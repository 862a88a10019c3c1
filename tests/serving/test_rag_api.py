"""POST /v1/rag/query: answers, citations, events and refusals, against the real gateway, engine and index."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest

from pipelines.rag.answer import ABSTENTION
from serving.launch import Running
from tests.serving.conftest import MODEL, PAGES, TUNED, metric, server_sent_events

QUESTION = "Who made Vela?"


def ask(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/v1/rag/query", json={"question": QUESTION, "max_tokens": 24} | body)


def test_an_answer_has_passages_timings_and_usage(http: httpx.Client) -> None:
    answer = ask(http, model=MODEL, k=2).json()
    assert [p["number"] for p in answer["passages"]] == [1, 2]
    best = answer["passages"][0]
    assert best["source"] == "vela.md" and "Orion Labs" in best["text"] and best["score"] > answer["passages"][1]["score"]
    assert all(c in answer["passages"] for c in answer["citations"])
    timings = answer["timings"]
    assert all(timings[stage] > 0 for stage in ("embed_seconds", "search_seconds", "prompt_seconds", "generate_seconds"))
    parts = sum(timings[f"{stage}_seconds"] for stage in ("embed", "search", "prompt", "generate"))
    assert timings["ttft_seconds"] < timings["total_seconds"] and parts <= timings["total_seconds"]
    assert answer["usage"]["prompt_tokens"] > 50 and answer["usage"]["completion_tokens"] >= 1
    assert answer["model"] == MODEL and answer["answer"]


def test_a_passage_that_gives_orders_is_held_back_and_told(http: httpx.Client) -> None:
    answer = ask(http, model=MODEL, k=3, max_tokens=1).json()
    assert [p["source"] for p in answer["held_back"]] == ["crow.md"]
    assert answer["held_back"][0]["reason"] == "tells to ignore instructions"
    assert {p["source"] for p in answer["passages"]} == set(PAGES)


def test_an_expression_says_which_passages_are_searched(http: httpx.Client) -> None:
    passages = ask(http, k=3, max_tokens=1, where='source like "k*" or title contains "Tern"').json()["passages"]
    assert {p["source"] for p in passages} == {"kite.md", "tern.md"}
    nothing = ask(http, where="page > 7").json()
    assert nothing["passages"] == [] and nothing["abstained"] and nothing["answer"]
    refused = ask(http, where="sourse = 'x'")
    assert refused.status_code == 422
    assert "'sourse' at character 1" in refused.json()["error"]["message"] and "source" in refused.json()["error"]["expected"]


def test_what_does_not_fit_into_the_prompt_is_left_out_and_told(
    http: httpx.Client, lab: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(http, model=MODEL, k=3, max_tokens=1).json()
    assert whole["left_out"] == [] and len(whole["passages"]) == 3
    tokens = whole["usage"]["prompt_tokens"]
    narrow = lab.service.knowledge.config.model_copy(update={"context_max_tokens": tokens - 1})
    monkeypatch.setattr(lab.service.knowledge, "config", narrow)
    answer = ask(http, model=MODEL, k=3, max_tokens=1).json()
    assert answer["usage"]["prompt_tokens"] < tokens and len(answer["passages"]) == 2
    assert answer["passages"] == whole["passages"][:2]
    assert [(p["chunk_id"], p["reason"]) for p in answer["left_out"]] == [
        (whole["passages"][2]["chunk_id"], "no room in the prompt")]  # fmt: skip
    monkeypatch.setattr(lab.service.knowledge, "config", narrow.model_copy(update={"context_max_tokens": 64}))
    assert len(ask(http, model=MODEL, k=3, max_tokens=1).json()["passages"]) == 1


def test_below_the_threshold_the_model_is_not_asked(http: httpx.Client, lab: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ask(http, k=2).json()
    assert 0.5 < answer["sign"] <= 1 and answer["abstained_by"] in (None, "model")
    knowledge = lab.service.knowledge
    monkeypatch.setattr(knowledge, "retriever", replace(knowledge.require(), threshold=answer["sign"] - 0.05))
    assert ask(http, k=2).json()["abstained_by"] in (None, "model")
    refused = ask(http, k=2, question="How do whales sleep?").json()
    assert refused["answer"] == ABSTENTION and refused["abstained"] and refused["abstained_by"] == "retrieval"
    assert refused["usage"] == {} and refused["citations"] == [] and len(refused["passages"]) == 2
    events = server_sent_events(ask(http, k=2, question="How do whales sleep?", stream=True))
    assert [kind for kind, _ in events] == ["passages", "answer"]


def test_each_sentence_says_what_it_cites_and_whether_that_holds_it(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving import rag_api

    text = "Vela was made by Orion Labs [1]. It has 80 billion parameters [1]. Kite is written in Rust [1]. Yes."
    monkeypatch.setattr(rag_api, "text_of", lambda _, replies=[text]: replies.pop() if replies else "")  # noqa: B006
    answer = ask(http, model=MODEL, k=3).json()
    assert answer["passages"][0]["source"] == "vela.md"
    assert [(s["text"], s["citations"], s["supported"]) for s in answer["sentences"]] == [
        ("Vela was made by Orion Labs.", [1], True),
        ("It has 80 billion parameters.", [1], False),
        ("Kite is written in Rust.", [1], False),
        ("Yes.", [], None),
    ]


def test_the_adapter_answers_unless_told_otherwise(http: httpx.Client) -> None:
    assert ask(http).json()["model"] == TUNED


def test_fewer_passages_than_asked_for_is_no_error(http: httpx.Client) -> None:
    assert len(ask(http, k=20, max_tokens=1).json()["passages"]) == len(PAGES)


def test_the_configured_k_is_used_without_one(http: httpx.Client) -> None:
    assert len(ask(http, max_tokens=1).json()["passages"]) == 3


def test_citations_are_the_passages_that_were_cited(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving import rag_api

    for text, cited, invalid, abstained in (
        ("Orion Labs [2] and [9]", [2], [9], False),
        (ABSTENTION, [], [], True),
    ):
        monkeypatch.setattr(rag_api, "text_of", lambda _, replies=[text]: replies.pop() if replies else "")  # noqa: B006
        answer = ask(http).json()
        assert [c["number"] for c in answer["citations"]] == cited
        assert answer["invalid_citations"] == invalid and answer["abstained"] is abstained


def test_a_stream_ends_with_the_same_answer(http: httpx.Client) -> None:
    whole = ask(http).json()
    response = ask(http, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = server_sent_events(response)
    kinds = [kind for kind, _ in events]
    assert kinds[0] == "passages" and kinds[-1] == "answer" and set(kinds[1:-1]) <= {"token", "citation", "sentence"}
    assert {k: events[-1][1][k] for k in ("answer", "passages")} == {k: whole[k] for k in ("answer", "passages")}
    assert events[0][1]["passages"] == whole["passages"]


def test_citations_and_sentences_come_as_soon_as_they_are_complete(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving import rag_api

    pieces = ["Vela was", " made by Orion Labs [", "1", "]", ".", " It has 80 billion parameters. [", "9]", "[1] Yes", "."]
    monkeypatch.setattr(rag_api, "text_of", lambda _, left=pieces: left.pop(0) if left else "")
    events = server_sent_events(ask(http, model=MODEL, k=3, stream=True))
    seen = [(kind, c.get("text") or (c.get("number"), c.get("valid"))) for kind, c in events[1:-1]]
    first = "Vela was made by Orion Labs."
    assert seen == [
        ("token", "Vela was"), ("token", " made by Orion Labs ["), ("token", "1"), ("token", "]"), ("citation", (1, True)),
        ("token", "."), ("token", " It has 80 billion parameters. ["), ("sentence", first), ("token", "9]"),
        ("citation", (9, False)), ("token", "[1] Yes"), ("sentence", "It has 80 billion parameters."), ("token", "."),
        ("sentence", "Yes."),
    ]  # fmt: skip
    passage = events[0][1]["passages"][0]
    cited = [c for kind, c in events if kind == "citation"]
    assert cited[0] == {"number": 1, "valid": True} | {f: passage[f] for f in ("chunk_id", "source", "title", "page")}
    assert cited[1] == {"number": 9, "valid": False, "chunk_id": None, "source": None, "title": None, "page": None}
    assert events[-1][1]["sentences"] == [c for kind, c in events if kind == "sentence"]
    assert [s["supported"] for s in events[-1][1]["sentences"]] == [True, False, None]


def test_an_abstention_streams_no_sentence(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving import rag_api

    pieces = [*ABSTENTION.split(" "), " It is so."]
    pieces = [pieces[0], *(f" {word}" for word in pieces[1:-1]), pieces[-1]]
    monkeypatch.setattr(rag_api, "text_of", lambda _, left=pieces: left.pop(0) if left else "")
    events = server_sent_events(ask(http, model=MODEL, stream=True))
    assert {kind for kind, _ in events} == {"passages", "token", "answer"} and events[-1][1]["abstained"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 10_000}, "1 to 20"),
        ({"k": -1}, "k is -1"),
        ({"k": "3"}, "valid integer"),
        ({"k": 2.5}, "valid integer"),
        ({"k": True}, "valid integer"),
        ({"question": ""}, "blank"),
        ({"question": " \n\t"}, "blank"),
        ({"question": "why " * 200}, "800 characters"),
        ({"question": "東" * 590}, "tokens"),
        ({"question": 5}, "valid string"),
        ({"question": None}, "valid string"),
        ({"question": "\ud800?"}, "Unicode"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 10**6}, "1 to 2048"),
        ({"top_k": 3}, "top_k"),
        ({"stream": "yes"}, "stream"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_questions(http: httpx.Client, wrong: dict[str, Any], words: str, stream: bool) -> None:
    from json import dumps

    body = dumps({"question": QUESTION, "stream": stream} | wrong)
    response = http.post("/v1/rag/query", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "expected", "next"}
    assert words in f"{error['message']} {error['expected']}" and "Traceback" not in response.text


def test_an_unknown_model(http: httpx.Client) -> None:
    response = ask(http, model="gpt-4")
    assert response.status_code == 404 and TUNED in response.json()["error"]["expected"]


def test_a_prompt_that_does_not_fit(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving import packing

    monkeypatch.setattr(packing, "messages", lambda *_: [{"role": "user", "content": "word " * 2000}])
    response = ask(http)
    assert response.status_code == 422 and "the context holds 1024" in response.json()["error"]["message"]
    kind, content = server_sent_events(ask(http, stream=True))[-1]
    assert kind == "error" and content["error"]["type"] == "ContextExceeded"


def test_a_defect_of_ours_gets_an_id_and_no_traceback(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from serving import rag_api

    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(rag_api, "Meter", broken)
    response = ask(http)
    assert response.status_code == 500 and "secret" not in response.text
    number = response.json()["error"]["message"].split()[-1]
    assert number in caplog.text and "secret detail" in caplog.text
    events = server_sent_events(ask(http, stream=True))
    assert events[-1][0] == "error" and "secret" not in str(events)
    assert metric(http, "llmlab_http_requests_total", route="/v1/rag/query", status="500") >= 1
