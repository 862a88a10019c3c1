# %% [markdown]
# # PEFT on LLaMA 4's experts
# Nearly all of LLaMA 4's weights are experts, kept as one stack for each layer. An adapter can go on attention, on the stacks,
# or on both. A small model of the architecture learns prose; then each way learns a library's source code.

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

lab = begin("peft-llama-4")
use_all_cores()
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
entry = find("llama-4")
assert entry.tuning
targets = entry.target_modules
frozen = [part for part in entry.tuning.frozen if part != "experts"]

# %% [markdown]
# ## A small LLaMA 4

# %%
LENGTH = lab.pick(128, 32)
prose, code = texts.manual(), texts.library(lab.pick(600_000, 60_000))
base = small.make(
    "llama-4",
    [],
    hidden_size=lab.pick(128, 64),
    num_hidden_layers=lab.pick(4, 2),
    num_local_experts=lab.pick(8, 4),
    intermediate_size=128,
)
learn_prose = small.blocks(prose, base.tokenizer, LENGTH)
learn_code = small.blocks([text for i, text in enumerate(code) if i % 8], base.tokenizer, LENGTH)
test_code = small.blocks(code[::8], base.tokenizer, LENGTH)[: lab.pick(160, 8)]
small.teach(base.model, learn_prose, lab.pick(250, 4), batch=16, rate=2e-3, say=lab.say)
before = float(small.losses(base.model, test_code).mean())
in_stacks = sum(p.numel() for name, p in base.model.named_parameters() if ".experts." in name)
lab.say(
    f"{base.parameters / 1e6:.1f} million parameters, {in_stacks / base.parameters:.0%} in stacks of experts; loss "
    f"on code {before:.2f}"
)


# %%
def tuned(rank: int, *, attention: bool, experts: bool) -> torch.nn.Module:
    """Return the small model with a fresh adapter; PEFT wants projections too, so those are frozen where only experts learn."""
    torch.manual_seed(small.SEED)
    model = adapter.attach(
        copy.deepcopy(base.model),
        Lora(rank=rank, alpha=2 * rank, dropout=0.0),
        targets,
        quantised=False,
        experts=STACKS if experts else (),
        frozen=frozen,
    )
    for name, parameter in model.named_parameters():
        if not attention and "lora_" in name and ".experts" not in name:
            parameter.requires_grad = False
    return model


def count(model: torch.nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


RANK = 4
on_experts = count(tuned(RANK, attention=False, experts=True))
as_many = max(1, round(RANK * on_experts / count(tuned(RANK, attention=True, experts=False))))
WAYS = {
    f"attention, rank {RANK}": (RANK, True, False),
    f"attention, rank {as_many}": (as_many, True, False),
    f"experts, rank {RANK}": (RANK, False, True),
    f"both, rank {RANK}": (RANK, True, True),
}

# %% [markdown]
# ## Tuned for the domain
# Each way with two learning rates; the one that ends with the lower training loss counts.

# %%
STEPS = lab.pick(70, 3)
falls, trained, merged_gap = {}, {}, 0.0
for name, (rank, attention, experts) in WAYS.items():
    tries = []
    for rate in (3e-3, 1e-2)[: lab.pick(2, 1)]:
        model = tuned(rank, attention=attention, experts=experts)
        trained[name] = count(model)
        end = small.teach(model, learn_code, STEPS, batch=16, rate=rate)[-STEPS // 4 :]
        tries.append((sum(end) / len(end), before - float(small.losses(model, test_code).mean())))
    falls[name] = min(tries)[1]
    lab.say(f"{name}: {trained[name]} trained, loss on code {-falls[name]:+.3f}")

# %%
with torch.inference_mode():
    said = model(input_ids=test_code[:4, :-1]).logits
    plain = model.merge_and_unload(safe_merge=True)
    merged_gap = float((plain(input_ids=test_code[:4, :-1]).logits - said).abs().max())
    untuned_gap = float((base.model.eval()(input_ids=test_code[:4, :-1]).logits - said).abs().max())

# %% [markdown]
# ## The true size
# Counted on LLaMA 4 Scout without its weights. bitsandbytes makes plain projections NF4, and a stack of experts is none.

# %%
recipe = load_recipe("lora", ["lora.rank=16"])
both = entry.model_copy(update={"tuning": entry.tuning.model_copy(update={"expert_parameters": STACKS, "frozen": frozen})})
parameters, in_four_bits, of_both = count_parameters(meta_model(both, recipe, experts=True), quantised=True)
_, _, of_attention = count_parameters(meta_model(entry, recipe, experts=True), quantised=False)
plain_bytes = 2 * (parameters - of_both)
quantised_bytes = in_four_bits * sizing.TUNED_BITS[4] / 8 + 2 * (parameters - of_both - in_four_bits)
served_bytes = sizing.served_bytes(meta_model(entry, recipe), 4)

# %%
control, stacks = list(falls)[1:3]
figure = Figure(figsize=(10, 4), layout="constrained")
left, right = figure.subplots(1, 2)
bars = left.bar([f"{name}\n{trained[name] / 1e3:.0f} thousand" for name in falls], list(falls.values()))
left.bar_label(bars, fmt="%.2f")
left.tick_params(axis="x", labelsize=7)
left.set(title="Learnt: fall of the loss on code", ylabel="nats per byte")
bars = right.bar(["16 bits", "QLoRA", "GGUF in 4 bits"], [plain_bytes / 1e9, quantised_bytes / 1e9, served_bytes / 1e9])
right.bar_label(bars, fmt="%.0f")
right.set(title="Weights of LLaMA 4 Scout", ylabel="GB")

# %%
setting = (
    f"a model of {base.parameters / 1e6:.1f} million parameters taught on Python's manual, then {STEPS} steps of 16 "
    f"x {LENGTH} bytes of its "
    f"library; {len(test_code)} kept-back pieces; the better of two learning rates each"
)
lab.conclude(
    {
        "merges": judged(
            merged_gap < 0.01 * untuned_gap,
            f"logits differ by {merged_gap:.1g} at most, where tuning moved them by {untuned_gap:.1f}",
            "the small model with adapters on attention and experts, before and after the merge",
            gap=merged_gap,
            moved=untuned_gap,
        ),
        "better": judged(
            falls[stacks] > falls[control],
            f"{falls[stacks]:.2f} nats with {stacks} ({trained[stacks]} trained), {falls[control]:.2f} "
            f"with {control} ({trained[control]})",
            setting,
            experts_nats=falls[stacks],
            attention_nats=falls[control],
        ),
        "small": judged(
            of_both < 0.01 * parameters,
            f"{of_both / 1e6:.0f} million of {(parameters - of_both) / 1e9:.0f} billion, "
            f"{of_both / parameters:.2%}; attention alone {of_attention / 1e6:.0f} million",
            "counted on the true architecture",
            both=of_both,
            attention=of_attention,
        ),
        "fourbit": judged(
            quantised_bytes <= plain_bytes / 3,
            f"{quantised_bytes / 1e9:.0f} GB of {plain_bytes / 1e9:.0f}: {in_four_bits / parameters:.0%} "
            f"of the weights become NF4, the stacks stay in 16 bits; GGUF's 4 bits, for serving, take "
            f"{served_bytes / 1e9:.0f} GB",
            "counted on the true architecture, by what bitsandbytes quantises in transformers as it is installed here",
            qlora_bytes=quantised_bytes,
            plain_bytes=plain_bytes,
            served_bytes=served_bytes,
        ),
    },
    figure,
)
