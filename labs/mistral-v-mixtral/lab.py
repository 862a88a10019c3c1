# %% [markdown]
# # Mistral 7B against Mixtral
# A mixture of experts keeps many feed-forward networks and sends each token to two of them. What does that save, and what not?
# Parameters and memory are counted on the true architectures, without their weights; the cost of a token is measured in
# llama.cpp on three small models that differ only in their feed-forward part: eight experts of which two work, a dense one of two
# experts' width, and a dense one of eight experts' width.

# %%
import random
import tempfile
from contextlib import ExitStack
from pathlib import Path

from matplotlib.figure import Figure

from labs.frame import llamacpp, small, texts
from labs.frame.session import begin
from labs.frame.verdict import judged
from pipelines import sizing
from pipelines.architecture import cache_of, config_of, on_meta
from pipelines.catalogue import find

lab = begin("mistral-v-mixtral")

# %% [markdown]
# ## Which parameters work for a token
# All but six of the eight experts in each layer.

# %%
mixtral, mistral = find("mixtral-8x7b"), find("mistral-7b")
model, settings = on_meta(config_of(mixtral)), config_of(mixtral)
total = sum(p.numel() for p in model.parameters())
experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
active = total - experts * (settings.num_local_experts - settings.num_experts_per_tok) // settings.num_local_experts
lab.say(f"{active / 1e9:.2f} of {total / 1e9:.2f} billion parameters work for a token")

# %% [markdown]
# ## Memory
# Every expert has to be at hand, whichever two the next token takes.

# %%
CONTEXT = 8192
table = sizing.gpus()
bytes_of, gpu_of = {}, {}
for entry in (mistral, mixtral):
    bytes_of[entry.name] = sizing.served_bytes(on_meta(config_of(entry)), 4)
    cache = cache_of(config_of(entry))
    gpu_of[entry.name] = next(
        (
            gpu
            for gpu in table.gpus
            if (fit := sizing.fit(table, gpu, bytes_of[entry.name], cache, CONTEXT, CONTEXT)) and fit.gpus == 1
        ),
        None,
    )

# %% [markdown]
# ## The cost of a token
# Three models of one shape in 8 bits, one thread each, in turns. What is counted is the time that the processor spends on the
# engine, so that other programs on the machine disturb it little.

# %%
width = lab.pick(1024, 256)
expert = lab.pick(3584, 512)
shape = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
SHAPES = {
    "two of eight experts": ("mixtral-8x7b", {"intermediate_size": expert, "num_local_experts": 8}),
    "dense, as large as two": ("mistral-7b", {"intermediate_size": 2 * expert}),
    "dense, as large as eight": ("mistral-7b", {"intermediate_size": 8 * expert}),
}
WRITTEN, ROUNDS = lab.pick((48, 5), (16, 1))
STREAMS = (1, 8)
draw = random.Random(5)
costs: dict[str, dict[int, list[float]]] = {name: {n: [] for n in STREAMS} for name in SHAPES}
with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
    engines = {}
    for number, (name, (entry_name, own)) in enumerate(SHAPES.items()):
        folder = Path(scratch) / str(number)
        made = small.make(entry_name, texts.manual()[:20], **shape, **own)
        file = llamacpp.smaller(llamacpp.write(made, entry_name, folder), "q8_0")
        lab.say(f"{name}: {made.parameters / 1e6:.0f} million parameters, {file.stat().st_size / 1e6:.0f} MB")
        running = llamacpp.running(file, folder / "work", context_tokens=256, slots=max(STREAMS), threads=1)
        engines[name] = stack.enter_context(running)
    for _ in range(ROUNDS):
        for streams in STREAMS:
            for name, engine in engines.items():
                prompts = [[draw.randrange(300, 2000) for _ in range(8)] for _ in range(streams)]
                costs[name][streams].append(engine.cpu_seconds_per_token(prompts, WRITTEN))

# %%
least = {name: {n: min(seconds) for n, seconds in by.items()} for name, by in costs.items()}
moe, as_two, as_eight = least.values()
to_two = {n: moe[n] / as_two[n] for n in STREAMS}
to_eight = {n: moe[n] / as_eight[n] for n in STREAMS}

figure = Figure(figsize=(10, 4), layout="constrained")
left, right = figure.subplots(1, 2)
for place, (name, by) in enumerate(least.items()):
    bars = left.bar([i + 0.27 * place for i in range(len(STREAMS))], [1000 * by[n] for n in STREAMS], 0.25, label=name)
    left.bar_label(bars, fmt="%.1f", fontsize=8)
left.set_xticks([i + 0.27 for i in range(len(STREAMS))], [f"{n} text{'s' * (n > 1)} at once" for n in STREAMS])
left.set(title="Processor time for a token", ylabel="milliseconds")
left.legend(fontsize=8)
dense = sum(p.numel() for p in on_meta(config_of(mistral)).parameters())
for place, (label, values) in enumerate(
    {
        "weights in 4 bits, GB": [bytes_of[entry.name] / 1e9 for entry in (mistral, mixtral)],
        "parameters that work for a token, billions": [dense / 1e9, active / 1e9],
    }.items()
):
    bars = right.bar([i + 0.4 * place for i in range(2)], values, 0.38, label=label)
    right.bar_label(bars, fmt="%.1f", fontsize=8)
right.set_xticks([0.2, 1.2], ["Mistral 7B", "Mixtral 8x7B"])
right.set(title="What has to be there, and what works")
right.legend(fontsize=8)

# %%
on_small = (
    f"llama.cpp, 8 bits, one thread, models of width {width} with random weights and an expert of {expert}; processor time of "
    f"the engine for a written token, the least of {ROUNDS} rounds taken in turns"
)
fits = {name: gpu.name if gpu else "none" for name, gpu in gpu_of.items()}
lab.conclude(
    {
        "active": judged(
            active < total / 3,
            f"{active / 1e9:.1f} of {total / 1e9:.1f} billion, {active / total:.0%}",
            "counted on the true architecture; the maker says 12.9 of 46.7",
            active_parameters=active,
            parameters=total,
        ),
        "cost": judged(
            to_two[1] <= 1.25,
            f"{to_two[1]:.2f} times the dense model as large as two experts, {to_eight[1]:.2f} times the one as large as eight",
            on_small,
            ratio_to_active=to_two[1],
            ratio_to_all=to_eight[1],
        ),
        "batch": judged(
            to_two[8] <= 1.25,
            f"{to_two[8]:.2f} times the dense model as large as two experts, {to_eight[8]:.2f} times the one as large as eight",
            on_small,
            ratio_to_active=to_two[8],
            ratio_to_all=to_eight[8],
        ),
        "memory": judged(
            fits[mistral.name] == fits[mixtral.name],
            f"{bytes_of[mixtral.name] / 1e9:.1f} GB against {bytes_of[mistral.name] / 1e9:.1f} GB of weights; the smallest "
            f"GPU with room for one text of {CONTEXT} tokens: {fits[mixtral.name]} against {fits[mistral.name]}",
            "arithmetic on the true architectures, as llmlab plan does it; no such GPU was used",
            mixtral_bytes=bytes_of[mixtral.name],
            mistral_bytes=bytes_of[mistral.name],
        ),
    },
    figure,
)
