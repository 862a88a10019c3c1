# %% [markdown]
# # Gemma 3 at the edge
# What does the smallest Gemma 3 take on a small machine? Its true architecture in its full size, with random weights: time and
# memory depend on shapes, not on what weights say. The quick form takes a shrunk one. Each form runs in llama.cpp, one thread
# and two.

# %%
import random
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from matplotlib.figure import Figure

from labs.frame import llamacpp, small, texts
from labs.frame.session import begin
from labs.frame.verdict import judged
from pipelines.architecture import FULL, cache_of, config_of, layer_kinds, loader
from pipelines.catalogue import find
from pipelines.hardware import use_all_cores

lab = begin("edge-gemma-3")
NAME = "gemma-3-1b"
FORMS = ("f16", "q8_0", "q4_k")
WRITTEN, ROUNDS = lab.pick((24, 3), (8, 1))
CONTEXT, LONG = 2048, lab.pick(32768, 8192)

# %% [markdown]
# ## The model

# %%
gemma = small.make(NAME, texts.manual()[:20])
if not lab.quick:
    torch.manual_seed(small.SEED)
    full = config_of(
        find(NAME), {field: getattr(gemma.tokenizer, field) for field in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    gemma = small.Small(loader(full).from_config(full).eval(), gemma.tokenizer)
settings = gemma.model.config
lab.say(f"{gemma.parameters / 1e6:.0f} million parameters")

# %% [markdown]
# ## PyTorch

# %%
draw = random.Random(5)


def prompt(tokens: int) -> list[int]:
    """Return token ids without a meaning."""
    return [draw.randrange(300, 2000) for _ in range(tokens)]


torch.set_num_threads(1)
ids = torch.tensor([prompt(8)])


def seconds_of(tokens: int) -> float:
    """Return the processor time in which transformers writes so many tokens."""
    before = time.process_time()
    with torch.inference_mode():
        gemma.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
    return time.process_time() - before


seconds_of(2)
few, more = 2, lab.pick(10, 34)
torch_seconds = (seconds_of(more) - seconds_of(few)) / (more - few)
use_all_cores()
lab.say(f"PyTorch in float32: {1 / torch_seconds:.1f} tokens a second of processor time")

# %% [markdown]
# ## llama.cpp
# Processor time of the engine with one thread, in turns, so that other programs disturb little; then tokens per second with all
# cores.

# %%
writing: dict[str, list[float]] = {form: [] for form in FORMS}
speed: dict[str, list[float]] = {form: [] for form in FORMS}
with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    gemma.model.to(torch.float16)
    whole = llamacpp.write(gemma, NAME, folder)
    files = {form: whole if form == "f16" else llamacpp.smaller(whole, form) for form in FORMS}
    sizes = {form: file.stat().st_size for form, file in files.items()}
    lab.say(", ".join(f"{form} {size / 1e9:.2f} GB" for form, size in sizes.items()))
    for threads, into in ((1, writing), (None, speed)):
        with ExitStack() as stack:
            engines = {
                form: stack.enter_context(
                    llamacpp.running(file, folder / f"work-{form}-{threads}", context_tokens=CONTEXT, threads=threads)
                )
                for form, file in files.items()
            }
            for _ in range(ROUNDS):
                for form, engine in engines.items():
                    if threads:
                        into[form].append(engine.cpu_seconds_per_token([prompt(8)], WRITTEN))
                    else:
                        into[form].append(engine.ask(prompt(8), WRITTEN).generated)
            if threads:
                memory = {form: engine.memory_bytes() for form, engine in engines.items()}
    with llamacpp.running(files["q4_k"], folder / "work-long", context_tokens=LONG) as engine:
        engine.ask(prompt(8), WRITTEN)
        long_bytes = engine.memory_bytes()

# %% [markdown]
# ## The cache

# %%
cache = cache_of(settings)
kinds = layer_kinds(settings)
windowed = cache.bytes(LONG)
all_full = cache.bytes(0) + 2 * (cache.whole + cache.windowed) * LONG
least = {form: min(seconds) for form, seconds in writing.items()}
fastest = {form: max(speeds) for form, speeds in speed.items()}

# %%
figure = Figure(figsize=(12, 3.8), layout="constrained")
first, second, third = figure.subplots(1, 3)
places = range(len(FORMS))
first.bar([i - 0.2 for i in places], [sizes[form] / 1e9 for form in FORMS], 0.4, label="file")
bars = first.bar([i + 0.2 for i in places], [memory[form] / 1e9 for form in FORMS], 0.4, label=f"engine, {CONTEXT} tokens")
first.bar_label(bars, fmt="%.2f", fontsize=8)
first.set_xticks(list(places), FORMS)
first.set(title="Memory", ylabel="GB")
first.legend(fontsize=8)
bars = second.bar([*FORMS, "PyTorch f32"], [1000 * s for s in (*least.values(), torch_seconds)])
second.bar_label(bars, fmt="%.3g", fontsize=8)
second.set(title="Processor time for a written token, one thread", ylabel="milliseconds")
bars = third.bar(["as it is", "all layers full"], [windowed / 1e6, all_full / 1e6])
third.bar_label(bars, fmt="%.0f")
third.set(title=f"Cache of {LONG} tokens, 16 bits", ylabel="MB")

# %%
what = f"Gemma 3 1B's true architecture, {lab.pick('full size', 'shrunk')}, random weights; llama.cpp"
lab.conclude(
    {
        "memory": judged(
            memory["q4_k"] <= 1.5e9,
            f"{memory['q4_k'] / 1e9:.2f} GB in 4 bits, {memory['q8_0'] / 1e9:.2f} in 8, {memory['f16'] / 1e9:.2f} in 16 "
            f"(files: {', '.join(f'{size / 1e9:.2f}' for size in reversed(sizes.values()))})",
            f"{what}, memory that it shares with nobody after its requests",
            **{f"{form}_bytes": size for form, size in memory.items()},
        ),
        "speed": judged(
            least["q4_k"] <= 0.5 * least["f16"],
            f"{least['q4_k'] / least['f16']:.2f} times ({', '.join(f'{f} {1000 * s:.3g} ms' for f, s in least.items())}); with "
            f"all cores {', '.join(f'{f} {s:.1f}' for f, s in fastest.items())} tokens/s at best",
            f"{what}, processor time with one thread, the least of "
            f"{ROUNDS} rounds in turns; tokens/s on a machine that others used too",
            **{f"{form}_seconds": s for form, s in least.items()},
        ),
        "pytorch": judged(
            torch_seconds <= 2 * least["q4_k"],
            f"{torch_seconds / least['q4_k']:.1f} times: {1000 * torch_seconds:.3g} ms in float32",
            f"{what} and transformers, processor time with one thread; JAX was not tried",
            torch_seconds=torch_seconds,
        ),
        "window": judged(
            windowed < all_full / 4,
            f"{windowed / 1e6:.0f} MB instead of {all_full / 1e6:.0f} MB ({kinds.count(FULL)} of {len(kinds)} layers see all); "
            f"the engine took {(long_bytes - memory['q4_k']) / 1e6:.0f} MB more for {LONG} tokens than for {CONTEXT}",
            "arithmetic on the true architecture, and the memory of llama.cpp with both contexts",
            windowed_bytes=windowed,
            full_bytes=all_full,
        ),
    },
    figure,
)
