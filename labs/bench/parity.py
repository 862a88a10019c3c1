"""What a quantisation costs: one model in transformers and in the engines, on the same prompts. `llmlab bench parity`

The reference is transformers in float32. From its weights a GGUF file is made for each quantisation, by the code of
`llmlab export`; of a base that a package ships as GGUF, that file is taken for its own quantisation. The prompts are the golden
chats of the template lock and the general questions of the proof card; each is asked for its likeliest reply.

    kl              Kullback-Leibler divergence of the next token's distribution from the reference's, in nats, after each
                    prompt and within the reference's reply; its mean, its worst, and how often both like the same token best
    logprob_gap     of the tokens at the beginning of a reply that are the reference's: mean difference of their log-probabilities
    equal_tokens    share of the reference's reply that is the same up to the first difference
    equal_replies   share of replies that are the same to their end

Packaged weights in 4 bits are what their float32 form was made from, so for them this measures the engine's arithmetic only,
which rounds what goes into such a matrix to 8 bits; for what rounding weights costs, name an export run: it is merged in float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from labs.bench.serve_contenders import VLLM, alone
from pipelines import catalogue
from pipelines.export.divergence import compare, golden_prompts, of_llamacpp, of_transformers
from pipelines.export.quantise import F16, is_in, quantise
from pipelines.hardware import vllm_is_installed

if TYPE_CHECKING:
    from pipelines.runs import Run
    from serving.engines.contract import Engine, Launch

QUANTISATIONS = (F16, "q8_0", "q4_1")
REPLY_TOKENS = 32
WITHIN = (0, 4, 12)  # places of the reference's reply after which distributions are compared
ALLOWED_KL = 0.02  # nats; what a recommended form may lose on the mean
CONTEXT_TOKENS = 1024
REPLY_SECONDS = 600.0  # before an engine counts as silent

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reply:
    """Token ids of a reply, their log-probabilities (NaN where the engine tells none), and the seconds that it took."""

    tokens: list[int]
    logprobs: list[float]
    seconds: float


@dataclass(frozen=True)
class Reference:
    """What transformers in float32 says.

    Attributes:
        prompts: token ids of each prompt.
        replies: its likeliest reply to each.
        end: the token that ends a reply; it is in none.
        places: prompts and beginnings of replies, after which distributions are compared.
        table: log-probabilities of the next token after each of them, float32 [places, vocabulary].
    """

    prompts: list[list[int]]
    replies: list[Reply]
    end: int
    places: list[list[int]]
    table: Any


def bench_parity(
    model: str, run: Run | None, quantisations: Sequence[str], prompts: int | None, progress: Progress, *, with_vllm: bool
) -> dict[str, Any]:
    """Return the document of a run.

    Args:
        model: a catalogue entry.
        run: an export run, whose merged model is taken in place of the base.
        quantisations: of `pipelines.export.quantise.choices`.
        prompts: how many; all for None.
        progress: is told (stage, done, total).
        with_vllm: ask vLLM too, if it is installed.

    Raises:
        LabError: the weights are not here, or a file cannot be made or run.
    """
    from pipelines.hardware import use_all_cores
    from pipelines.tune.finetune import MODEL_FOLDER
    from pipelines.weights import hf_directory

    use_all_cores()
    entry = catalogue.runnable(model)
    folder = run.path / MODEL_FOLDER if run else hf_directory(entry)
    reference = _reference(folder, prompts, progress)
    found: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as scratch:
        files = _files(folder, None if run else entry, quantisations, Path(scratch), progress)
        for done, (name, file) in enumerate(files.items()):
            progress("distributions", done, len(files))
            found[name] = {"bytes": file.stat().st_size, **_distance(reference, of_llamacpp(file, reference.places))}
        progress("distributions", len(files), len(files))
        bases = {**files, VLLM: folder} if with_vllm and vllm_is_installed() else files
        _add_replies(found, reference, bases, Path(scratch), progress)
    left_out = {} if VLLM in found else {VLLM: "not asked for" if vllm_is_installed() else "make setup-vllm"}
    return {
        "model": model, "run": run.id if run else None, "prompts": len(reference.prompts), "places": len(reference.places),
        "reference_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")), "forms": found,
        "recommended": recommended(found), "left_out": left_out,
    }  # fmt: skip


def recommended(forms: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the fastest GGUF form that loses no more than `ALLOWED_KL`, or the one that loses least; None of none."""
    of = {name: form for name, form in forms.items() if "kl_mean" in form}
    good = [name for name, form in of.items() if form["kl_mean"] <= ALLOWED_KL]
    if good:
        return max(good, key=lambda name: float(of[name]["tokens_per_second"]))
    return min(of, key=lambda name: float(of[name]["kl_mean"]), default=None)


def beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two replies have in common before they first differ."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def _reference(folder: Path, prompts: int | None, progress: Progress) -> Reference:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipelines.tune import template
    from pipelines.weights import quiet_loading

    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = golden_prompts(template.lock(tokenizer), tokenizer)[:prompts]
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    replies = []
    for done, prompt in enumerate(asked, 1):
        ids, began = torch.tensor([prompt]), time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=REPLY_TOKENS, do_sample=False,
                pad_token_id=tokenizer.eos_token_id, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        tokens = _without(tokenizer.eos_token_id, made.sequences[0, len(prompt) :].tolist())
        chosen = [float(row[0].log_softmax(-1)[token]) for row, token in zip(made.logits, tokens, strict=False)]
        replies.append(Reply(tokens, chosen, time.perf_counter() - began))
        progress("reference", done, len(asked))
    places = [p + reply.tokens[:n] for p, reply in zip(asked, replies, strict=True) for n in WITHIN if n <= len(reply.tokens)]
    return Reference(asked, replies, tokenizer.eos_token_id, places, of_transformers(model, places))


def _files(
    folder: Path, entry: catalogue.Model | None, names: Sequence[str], scratch: Path, progress: Progress
) -> dict[str, Path]:
    """Return a GGUF file for each quantisation; those that are made lie in `scratch`."""
    from pipelines.export.convert import to_gguf
    from pipelines.weights import packaged_gguf

    packaged = packaged_gguf(entry) if entry else None
    whole = scratch / f"{F16}.gguf"
    progress("converting", 0, 1)
    to_gguf(folder, whole)
    progress("converting", 1, 1)
    files = {}
    for name in names:
        if packaged and is_in(packaged, name):
            files[name] = packaged
        else:
            files[name] = scratch / f"{name}.gguf"
            if name != F16:
                quantise(whole, files[name], name, progress)
    return files


def _distance(reference: Reference, table: Any) -> dict[str, Any]:
    found = compare(reference.table, table)
    return {"kl_mean": found.mean, "kl_worst": found.worst, "same_first_choice": found.same_first_choice}


def _add_replies(
    found: dict[str, dict[str, Any]], reference: Reference, bases: Mapping[str, Path], scratch: Path, progress: Progress
) -> None:
    """Ask all engines for replies, prompt by prompt in turns, and add what is the same and how fast they were."""
    from serving.engines.llamacpp import LlamaCpp
    from serving.engines.vllm import Vllm

    replies: dict[str, list[Reply]] = {}
    with ExitStack() as stack:
        engines: dict[str, tuple[Engine, Launch]] = {}
        for name, base in bases.items():
            engine: Engine = Vllm() if name == VLLM else LlamaCpp()
            engines[name] = engine, stack.enter_context(alone(engine, name, base, scratch / f"work-{name}", CONTEXT_TOKENS, 1))
        for done, prompt in enumerate(reference.prompts, 1):
            for name, (engine, launch) in engines.items():
                replies.setdefault(name, []).append(_reply(engine, launch, prompt, reference.end))
            progress("replies", done, len(reference.prompts))
    for name, given in replies.items():
        found.setdefault(name, {}).update(_sameness(given, reference))


def _sameness(given: Sequence[Reply], reference: Reference) -> dict[str, Any]:
    pairs = list(zip(given, reference.replies, strict=True))
    same = [beginning(reply.tokens, wanted.tokens) for reply, wanted in pairs]
    whole = [reply.tokens == wanted.tokens for reply, wanted in pairs]
    both = [(a, b) for n, (reply, wanted) in zip(same, pairs, strict=True)
            for a, b in zip(reply.logprobs[:n], wanted.logprobs[:n], strict=True)]  # fmt: skip
    gaps = [abs(a - b) for a, b in both if not math.isnan(a)]
    return {
        "logprob_gap": sum(gaps) / len(gaps) if gaps else None,
        "equal_tokens": sum(same) / max(1, sum(len(wanted.tokens) for _, wanted in pairs)),
        "equal_replies": sum(whole) / len(whole),
        "first_difference": min((n for n, all_of_it in zip(same, whole, strict=True) if not all_of_it), default=None),
        "tokens_per_second": sum(len(reply.tokens) for reply in given) / sum(reply.seconds for reply in given),
    }  # fmt: skip


def _reply(engine: Engine, launch: Launch, prompt: Sequence[int], end: int) -> Reply:
    """Return an engine's likeliest reply to token ids; each engine has its own way to give token ids back."""
    import httpx

    began = time.perf_counter()
    if engine.name == VLLM:
        body = {"model": launch.model, "prompt": prompt, "max_tokens": REPLY_TOKENS, "temperature": 0, "logprobs": 1,
                "return_token_ids": True}  # fmt: skip
        reply = httpx.post(f"{launch.url}/v1/completions", json=body, timeout=REPLY_SECONDS, trust_env=False)
        choice = reply.raise_for_status().json()["choices"][0]
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    else:
        body = {"prompt": prompt, "n_predict": REPLY_TOKENS, "temperature": 0, "n_probs": 1, "return_tokens": True,
                "cache_prompt": False}  # fmt: skip
        reply = httpx.post(f"{launch.url}/completion", json=body, timeout=REPLY_SECONDS, trust_env=False)
        content = reply.raise_for_status().json()
        tokens, logprobs = content["tokens"], aligned(content["tokens"], content["completion_probabilities"])
    return Reply(_without(end, tokens), logprobs, time.perf_counter() - began)


def aligned(tokens: Sequence[int], places: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the log-probability of each token; NaN for one that llama.cpp left out, as it does within a character of several."""
    logprobs, left = [], list(places)
    for token in tokens:
        logprobs.append(float(left.pop(0)["logprob"]) if left and left[0]["id"] == token else math.nan)
    return logprobs


def _without(end: int, tokens: list[int]) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] == end else tokens
