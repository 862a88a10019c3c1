# %% [markdown]
# # LoRA on LLaMA 2's architecture for a domain
# A small model of LLaMA 2's architecture first learns English prose about a language. Then it is tuned for a domain it has not
# seen, the source code of a library: all weights, or an adapter (Hu et al. 2021, arXiv 2106.09685) of some rank. What does each
# learn in the same steps, and what does each forget?

# %%
import copy

import torch
from matplotlib.figure import Figure

from labs.frame import small, texts
from labs.frame.session import begin
from labs.frame.verdict import judged
from pipelines import sizing
from pipelines.catalogue import find
from pipelines.hardware import use_all_cores
from pipelines.plan import count_parameters, meta_model
from pipelines.tune import adapter
from pipelines.tune.recipe import Lora, load_recipe
from pipelines.tune.rehearsal import train_tokenizer

lab = begin("lora-llama-2")
use_all_cores()

# %% [markdown]
# ## What the model knows, and the domain

# %%
LENGTH = lab.pick(128, 32)
prose, code = texts.manual(), texts.library(lab.pick(600_000, 60_000))
base = small.make(
    "llama-2",
    [],
    train_tokenizer(find("mpt-7b"), []),  # bytes; LLaMA 2's own would spell each space in three
    hidden_size=lab.pick(128, 64),
    intermediate_size=lab.pick(352, 128),
    num_hidden_layers=lab.pick(4, 2),
    num_attention_heads=4,
    num_key_value_heads=4,
)


def divided(written: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is learnt and what is kept back: every eighth text."""
    kept = small.blocks(written[::8], base.tokenizer, LENGTH)[: lab.pick(160, 16)]
    return small.blocks([text for i, text in enumerate(written) if i % 8], base.tokenizer, LENGTH), kept


(learn_prose, test_prose), (learn_code, test_code) = divided(prose), divided(code)
small.teach(base.model, learn_prose, lab.pick(300, 8), batch=16, rate=2e-3, say=lab.say)


def measured(model: torch.nn.Module) -> tuple[float, float]:
    """Return the losses on the domain and on the prose, nats per byte."""
    return float(small.losses(model, test_code).mean()), float(small.losses(model, test_prose).mean())


before = measured(base.model)
lab.say(f"{base.parameters / 1e6:.1f} million parameters; loss on the domain {before[0]:.2f}, on prose {before[1]:.2f}")

# %% [markdown]
# ## Tuned for the domain
# Each way with two learning rates; the one that ends with the lower training loss counts.

# %%
STEPS = lab.pick(80, 4)
RATES = {"all weights": (5e-4, 2e-3)} | dict.fromkeys((f"rank {r}" for r in lab.pick((2, 16), (4,))), (3e-3, 1e-2))
targets = find("llama-2").target_modules
after, trained = {}, {}
for name, rates in RATES.items():
    tries = []
    for rate in rates[: lab.pick(2, 1)]:
        model = copy.deepcopy(base.model)
        if name != "all weights":
            rank = int(name.removeprefix("rank "))
            torch.manual_seed(small.SEED)
            model = adapter.attach(model, Lora(rank=rank, alpha=2 * rank, dropout=0.0), targets, quantised=False)
        trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        end = small.teach(model, learn_code, STEPS, batch=16, rate=rate)[-STEPS // 4 :]
        tries.append((sum(end) / len(end), measured(model)))
    after[name] = min(tries)[1]
    lab.say(f"{name}: {trained[name]} trained, loss on the domain {after[name][0]:.2f}, on prose {after[name][1]:.2f}")

# %% [markdown]
# ## The true size
# Counted on LLaMA 2 7B without its weights. All weights take 16 bytes each: weight, gradient and AdamW's two moments.

# %%
entry, recipe = find("llama-2"), load_recipe("lora", ["lora.rank=16"])
parameters, _, of_adapter = count_parameters(meta_model(entry, recipe), quantised=False)
table = sizing.gpus()
needs, batch = sizing.needs(entry, recipe)
of_bits = {need.bits: need.tune_bytes for need in needs}
all_bytes = sizing.TUNED_BYTES * (parameters - of_adapter)
gpu_24, gpu_80 = (next(g for g in table.gpus if g.memory_gib == gib) for gib in (24, 80))
with_lora, with_qlora = (sizing.fewest(table, gpu_24, of_bits[bits]) == 1 for bits in (16, 4))
all_fit = sizing.fewest(table, gpu_80, all_bytes) == 1

# %%
falls = {name: before[0] - domain for name, (domain, _) in after.items()}
rises = {name: general - before[1] for name, (_, general) in after.items()}
best = list(after)[-1]
share = falls[best] / falls["all weights"]
figure = Figure(figsize=(10, 4), layout="constrained")
left, right = figure.subplots(1, 2)
for axes, values, title in (
    (left, falls, "Learnt: fall of the loss on code"),
    (right, rises, "Forgotten: rise of the loss on prose"),
):
    bars = axes.bar([f"{name}\n{trained[name] / base.parameters:.1%} trained" for name in values], list(values.values()))
    axes.bar_label(bars, fmt="%.2f")
    axes.set(title=title, ylabel="nats per byte")

# %%
setting = (
    f"a model of {base.parameters / 1e6:.1f} million parameters taught on Python's manual, then {STEPS} steps of 16 "
    f"x {LENGTH} bytes of its "
    f"library; {len(test_code)} and {len(test_prose)} kept-back pieces; the better of two learning rates each"
)
lab.conclude(
    {
        "share": judged(
            of_adapter < 0.01 * parameters,
            f"{of_adapter / 1e6:.1f} million of {(parameters - of_adapter) / 1e9:.2f} billion, {of_adapter / parameters:.2%}",
            "counted on the true architecture",
            share=of_adapter / parameters,
        ),
        "domain": judged(
            share >= 0.9,
            f"{best}: {share:.0%} of the fall of all weights ({falls[best]:.2f} of {falls['all weights']:.2f} nats), "
            f"with {trained[best] / base.parameters:.1%} as many trained numbers",
            setting,
            share_of_fall=share,
        ),
        "forgets": judged(
            rises[best] < rises["all weights"],
            f"loss on prose {rises[best]:+.2f} nats with {best}, {rises['all weights']:+.2f} with all weights",
            setting,
            rise_adapter_nats=rises[best],
            rise_all_nats=rises["all weights"],
        ),
        "gpu": judged(
            with_lora and not all_fit,
            f"{of_bits[16] / 1e9:.1f} GB with LoRA on 16 bits, {of_bits[4] / 1e9:.1f} GB with QLoRA, "
            f"{all_bytes / 1e9:.0f} GB and more with all weights",
            f"arithmetic as llmlab plan does it, a step of {batch.sequences} x {batch.tokens} tokens; no such GPU was used",
            lora_bytes=of_bits[16],
            qlora_bytes=of_bits[4],
            all_bytes=all_bytes,
        ),
    },
    figure,
)
