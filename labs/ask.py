"""Ask the running server a question and show the answer with its sources. `make ask Q="Who developed Falcon 40B?"`"""

from __future__ import annotations

from typing import Any

from pipelines.errors import EngineError, LabError

TIMEOUT_SECONDS = 300.0


def ask(server: str, question: str, k: int | None = None) -> dict[str, Any]:
    """Return the server's answer to a question; see POST /v1/rag/query.

    Raises:
        EngineError: nothing answers at that address.
        LabError: the server refused the question; says why.
    """
    import httpx

    body = {"question": question} | ({"k": k} if k is not None else {})
    try:
        response = httpx.post(f"{server}/v1/rag/query", json=body, timeout=TIMEOUT_SECONDS, trust_env=False)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise EngineError(
            f"nothing answers at {server} ({type(error).__name__})", "a running server", "make serve, in another terminal"
        ) from None
    try:
        content: dict[str, Any] = response.json()
        problem = content["error"] if response.is_error else {}
    except (ValueError, KeyError, TypeError):
        raise EngineError(f"what answers at {server} is not this gateway (HTTP {response.status_code})", "a running server",
                          "make serve PORT=8001, then make ask PORT=8001") from None  # fmt: skip
    if response.is_error:
        raise LabError(f"the server refused (HTTP {response.status_code}): {problem['message']}", problem.get("expected", ""),
                       problem.get("next", ""))  # fmt: skip
    return content


def show_answer(answer: dict[str, Any]) -> None:
    """Print an answer, the passages it cites, and where the time went."""
    from labs.screen import OUT

    OUT.print(answer["answer"], style="bold", markup=False)
    for passage in answer["citations"]:
        OUT.print(f"  [{passage['number']}] {passage['title']} ({passage['source']}, score {passage['score']:.2f})", markup=False)
        OUT.print(f"      {passage['text']}", markup=False, style="dim")
    if answer["abstained"]:
        OUT.print("  nearest: " + "; ".join(p["title"] for p in answer["passages"]), markup=False, style="dim")
    times = ", ".join(
        f"{stage.removesuffix('_seconds')} {value:.2f} s" for stage, value in answer["timings"].items() if value is not None
    )
    OUT.print(f"  {answer['model']}: {times}", markup=False, style="dim")
