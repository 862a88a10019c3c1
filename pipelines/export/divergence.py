"""How far a model moved: the Kullback-Leibler divergence of its next-token distributions from those of another form of it.

The prompts are the golden chats of the template lock and the general questions of the proof card, so the same tokens go into
transformers and into llama.cpp. KL(p || q) is in nats, with p from the form before the step and q from the form after it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import ROOT, load, named
from pipelines.errors import ExportFailed
from pipelines.hardware import OPENMP_ENVIRONMENT, probe
from pipelines.tune.proof import General
from pipelines.tune.template import render_with

if TYPE_CHECKING:
    import numpy as np

WHY = re.compile(r"(?:\.(?:cpp|c|cu|h):\d+: )(.*)|(.*error.*)", re.IGNORECASE)  # ggml's failed checks begin with file and line
NO_CHANCE = -1e4  # log-probability of a token that an engine does not list


@dataclass(frozen=True)
class Divergence:
    """Of one step.

    Attributes:
        mean: of KL(p || q) over the prompts, in nats.
        worst: the largest.
        same_first_choice: share of the prompts after which both find the same token most likely.
        prompts: how many.
    """

    mean: float
    worst: float
    same_first_choice: float
    prompts: int


def golden_prompts(lock: Mapping[str, Any], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of the golden chats of a run and of the general questions."""
    render = render_with(tokenizer)
    questions = [
        render([{"role": "user", "content": question}]) for question, _ in load(named("proof", "general"), General).general
    ]
    return [list(golden["token_ids"]) for golden in lock["golden"]] + questions


def of_transformers(model: Any, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the log-probabilities of the next token after each prompt, float32 [prompts, vocabulary]."""
    import torch

    model.eval()
    with torch.inference_mode():
        rows = [model(input_ids=torch.tensor([list(p)], device=model.device), logits_to_keep=1).logits[0, -1] for p in prompts]
        table: np.ndarray = torch.stack(rows).float().log_softmax(dim=-1).cpu().numpy()
    return table


def of_llamacpp(file: Path, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the same from llama.cpp, which runs in a process of its own.

    Raises:
        ExportFailed: it cannot load the file or does not answer.
    """
    import numpy as np

    command = [sys.executable, "-m", __name__, str(file)]
    done = subprocess.run(command, input=json.dumps([list(p) for p in prompts]), capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT)} | OPENMP_ENVIRONMENT)  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        came = f"llama.cpp cannot run {file.name}: {reason(done.stderr)}"
        raise ExportFailed(came, "an architecture and a size that llama.cpp knows",
                           "llmlab export --quantisation none keeps the merged model")  # fmt: skip
    answers = json.loads(lines[-1])
    table = np.full((len(answers), 1 + max(token for answer in answers for token, _ in answer)), NO_CHANCE, dtype=np.float32)
    for row, answer in zip(table, answers, strict=True):
        for token, value in answer:
            row[token] = NO_CHANCE if value is None else value
    return table


def reason(stderr: str) -> str:
    """Return the line that says why llama.cpp ended: its first error or failed check, not the debugger's words after it."""
    said = [re.sub(r"^[\d.]+ [A-Z] ", "", line.strip()) for line in stderr.splitlines() if line.strip()]
    telling = (found[1] or found[2] for line in said if (found := WHY.search(line)))
    return next(telling, said[-1] if said else "no message")


def compare(before: np.ndarray, after: np.ndarray) -> Divergence:
    """Return the divergence of two tables of log-probabilities, [prompts, vocabulary] each."""
    import numpy as np

    size = min(before.shape[1], after.shape[1])  # an embedding may have rows behind the vocabulary
    p, q = (np.maximum(table[:, :size].astype(np.float64), NO_CHANCE) for table in (before, after))
    divergences = (np.exp(p) * (p - q)).sum(axis=1)
    same = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    divergences = np.maximum(divergences, 0.0)  # never negative, but for rounding
    return Divergence(float(divergences.mean()), float(divergences.max()), float(same), len(divergences))


def main(file: str) -> None:
    """Print, as one JSON line, for each prompt on standard input the (token, log-probability) pairs of llama.cpp."""
    import httpx
    import xllamacpp

    prompts: list[list[int]] = json.load(sys.stdin)
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.hostnames, parameters.port = file, ["127.0.0.1"], 0
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = max(map(len, prompts)) + 8, 1, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = probe().cpus
    parameters.fit_params, parameters.ui, parameters.verbosity = False, False, 1
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as error:
        sys.exit(str(error))
    answers = []
    with httpx.Client(base_url=server.listening_address, trust_env=False, timeout=600) as client:
        # What is drawn does not touch the probabilities, but a token that is half a letter would be held back with them.
        drawn = client.post("/tokenize", json={"content": "a"}).raise_for_status().json()["tokens"][-1]
        for prompt in prompts:
            body = {"prompt": prompt, "n_predict": 1, "n_probs": 1_000_000, "temperature": 0.0, "cache_prompt": False,
                    "logit_bias": [[drawn, 1000.0]]}  # fmt: skip
            reply = client.post("/completion", json=body).raise_for_status().json()
            found = reply["completion_probabilities"][0]["top_logprobs"]
            answers.append([(item["id"], item["logprob"]) for item in found])
    sys.stdout.write(json.dumps(answers) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the server's threads have no end of their own


if __name__ == "__main__":
    main(sys.argv[1])
