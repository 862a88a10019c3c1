# %% [markdown]
# # The interview question, from end to end
# "How would you fine-tune LLaMA 4 for a domain-specific RAG pipeline?" The answer names LoRA, a vector store, LangChain, an
# engine and Prometheus. Here is all of that with real parts on one machine: SmolLM2-135M in place of LLaMA 4, Qdrant in a
# folder in place of Pinecone, llama.cpp in place of vLLM. The domain is the project's own pages on models; the questions are
# about models that training never saw.

# %%
import shutil
import time

from matplotlib.figure import Figure

from labs.chains.langchain_rag import chain
from labs.frame.session import begin
from labs.frame.verdict import judged, not_here
from labs.screen import TuningScreen
from monitoring import queries
from monitoring.prometheus_server import PrometheusServer, resolve_config
from pipelines.catalogue import find
from pipelines.config import load, named
from pipelines.evaluate.scores import normalise, token_f1
from pipelines.rag.answer import parse
from pipelines.rag.embed import load_embedder
from pipelines.rag.index import RagConfig, open_index, sync
from pipelines.rag.retrieve import Retriever
from pipelines.rag.stores.copying import copy_to
from pipelines.tune import data
from pipelines.tune.finetune import Job, finetune
from serving.address import check_free
from serving.launch import running
from serving.settings import load_serve_config

lab = begin("capstone-rag")
folder = lab.own_folders()
seconds: dict[str, float] = {}
MODEL, K = "smollm2-135m", 3

# %% [markdown]
# ## Fine-tune
# LoRA on questions, passages and answers of the domain; some questions have no answer in their passages, so that the model learns
# to say so.

# %%
began = time.perf_counter()
with TuningScreen() as watcher:
    tuned = finetune(Job(MODEL, "lora-quick", (f"schedule.steps={lab.pick(36, 1)}",), pull=False), watcher)
seconds["fine-tune"] = time.perf_counter() - began

# %% [markdown]
# ## Index, and copy it to a vector store
# All pages; in the quick form only those of the models that are asked about.

# %%
began = time.perf_counter()
reader = data.load_reader("reader")
pages = lab.pick(data.KNOWLEDGE, folder / "pages")
if lab.quick:
    pages.mkdir()
    for name in reader.test_models:
        shutil.copy(data.KNOWLEDGE / f"{name}.md", pages)
config = load(named("rag", "default"), RagConfig)
embedder = load_embedder(config.embedder)
done = sync(pages, "knowledge", config, embedder)
url = f"qdrant:{folder / 'qdrant'}"
copied = copy_to(url, "knowledge", config, embedder, lambda *_: None)
here = Retriever(open_index("knowledge", embedder), embedder, config)
there = Retriever(open_index("knowledge", embedder, url), embedder, config)
seconds["index and store"] = time.perf_counter() - began
lab.say(f"{done.chunks} passages of {done.documents} pages, {copied.sent} sent to Qdrant")

# %% [markdown]
# ## Questions
# About models that were kept out of training, each with the answer as the page has it; and some about models that do not exist.

# %%
asked = [variants[0] for variants in data.by_fact(reader, reader.test_models)][:: lab.pick(5, 40)]
unknown = [data.about(asked[i % len(asked)], title) for i, title in enumerate(reader.invented_titles_for_test)][
    : lab.pick(None, 1)
]
same = [
    [h.chunk_id for h in here.retrieve(q.text, K).hits] == [h.chunk_id for h in there.retrieve(q.text, K).hits] for q in asked
]
lab.say(f"{len(asked)} questions and {len(unknown)} without an answer; {sum(same)} find the same passages in the store")

# %% [markdown]
# ## Serve, ask through LangChain, watch with Prometheus
# The chain takes its passages from the vector store and its answers from the gateway, once from the base and once from the
# adapter.

# %%
MOST_TOKENS = 48
began = time.perf_counter()
replies: dict[str, list[str]] = {}
serving = load_serve_config("default", ["port=0", "engine_port=0", "keys=null"])
with running(MODEL, serving, adapter=tuned.id, say=lab.say) as server:
    listen = f"127.0.0.1:{check_free('127.0.0.1', 0, '')}"
    targets = resolve_config(folder / "prometheus", server.url.removeprefix("http://"), scrape_seconds=1, alertmanager=None)
    with PrometheusServer(targets, folder / "prometheus" / "data", listen) as prometheus:
        time.sleep(3)  # two scrapes before there is anything to count
        for name in (MODEL, f"{MODEL}-tuned"):
            ask = chain(there, server.url, K, MOST_TOKENS, name)
            replies[name] = [ask.invoke(question.text) for question in (*asked, *unknown)]
            lab.say(f"{name}: {replies[name][0]!r}")
        time.sleep(3)

        def total(series: str) -> float:
            """Return the sum of a counter over its labels, as Prometheus has it now."""
            return sum(points.points[-1][1] for points in queries.now(prometheus.url, f"sum({series})"))

        counted = {
            "generations": total("llmlab_generation_requests_total"),
            "tokens written": total("llmlab_generated_tokens_total"),
            "tokens read": total("llmlab_prompt_tokens_total"),
        }
seconds["serve and ask"] = time.perf_counter() - began

# %% [markdown]
# ## Base against tuned

# %%
passages = [there.retrieve(question.text, K).hits for question in asked]
scores: dict[str, dict[str, float]] = {}
for name, texts in replies.items():
    read = [parse(text, K) for text in texts]
    answered = list(zip(asked, read[: len(asked)], passages, strict=True))
    scores[name] = {
        "token F1": sum(token_f1("" if r.abstained else r.text, q.answer or "") for q, r, _ in answered) / len(asked),
        "exact match": sum(normalise(r.text) == normalise(q.answer or "") for q, r, _ in answered) / len(asked),
        "right citation": sum(any((q.answer or "") in hits[n - 1].text for n in r.cited) for q, r, hits in answered) / len(asked),
        "any citation": sum(bool(r.cited) for _, r, _ in answered) / len(asked),
        "abstained, no answer": sum(r.abstained for r in read[len(asked) :]) / len(unknown),
    }
base, adapted = scores.values()

# %%
figure = Figure(figsize=(11, 4), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=[2, 1])
for place, (name, by) in enumerate(scores.items()):
    bars = left.bar([i + 0.4 * place for i in range(len(by))], list(by.values()), 0.38, label=name)
    left.bar_label(bars, fmt="%.2f", fontsize=8)
left.set_xticks([i + 0.2 for i in range(len(base))], list(base))
left.set(title=f"{len(asked)} questions with an answer, {len(unknown)} without, through LangChain", ylim=(0, 1.1))
left.legend(fontsize=8)
right.barh(list(seconds)[::-1], list(seconds.values())[::-1])
right.set(title="Time", xlabel="seconds")

# %%
sent = sum(map(len, replies.values()))
setting = (
    f"{find(MODEL).title} by llama.cpp behind the gateway, passages from Qdrant, {len(asked)} questions about models "
    f"that training "
    f"never saw; {tuned.facts['rows']} rows learnt in {seconds['fine-tune']:.0f} s"
)
lab.conclude(
    {
        "tuned": judged(
            adapted["token F1"] >= 2 * base["token F1"],
            f"token F1 {adapted['token F1']:.2f} against {base['token F1']:.2f}, exact match "
            f"{adapted['exact match']:.2f} against "
            f"{base['exact match']:.2f}",
            setting,
            f1_base=base["token F1"],
            f1_tuned=adapted["token F1"],
        ),
        "cites": judged(
            adapted["right citation"] >= 2 / 3 and base["any citation"] == 0,
            f"{adapted['right citation']:.0%} with a right citation against {base['right citation']:.0%}; abstained from "
            f"{adapted['abstained, no answer']:.0%} of {len(unknown)} questions about models that do not exist, base "
            f"{base['abstained, no answer']:.0%}",
            setting,
            cited_base=base["right citation"],
            cited_tuned=adapted["right citation"],
        ),
        "store": judged(
            all(same),
            f"the same {K} passages in the same order for {sum(same)} of {len(same)} questions",
            f"{copied.chunks} passages in Qdrant (a folder) and in FAISS, words weighed in alike",
            same=sum(same),
            questions=len(same),
        ),
        "counted": judged(
            counted["generations"] == sent,
            f"{counted['generations']:.0f} of {sent} generations, {counted['tokens read']:.0f} tokens read, "
            f"{counted['tokens written']:.0f} written",
            "sums of the gateway's counters, asked from Prometheus after the last answer",
            counted=counted["generations"],
            sent=sent,
        ),
        "as_asked": not_here(
            "no weights of LLaMA 4, no GPU for them, and no account of Pinecone are here",
            "llmlab pull llama-4, ENGINE=vllm on 8 GPUs (llmlab plan llama-4) and a pinecone: URL in configs/rag would allow it",
        ),
    },
    figure,
)
