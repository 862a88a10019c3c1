# %% [markdown]
# # DPO on OpenChat's architecture
# Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) needs no reward model: a pair of replies and the model
# as it was are enough. A small model of OpenChat's architecture, with its template, first learns to write the better replies of
# a real set of preferences, then an adapter learns to prefer them. Does it prefer the better replies of pairs that it never
# saw, or only longer ones?

# %%
import json
import math
import random
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

from labs.frame import small, texts
from labs.frame.session import begin
from labs.frame.verdict import judged
from pipelines.catalogue import find
from pipelines.hardware import use_all_cores
from pipelines.tune import adapter, source
from pipelines.tune.packing import Packed, encode_pair, tree
from pipelines.tune.preference import Preferences, log_probabilities
from pipelines.tune.recipe import Lora, Recipe, load_recipe
from pipelines.tune.rows import Row
from pipelines.tune.sft import Supervised
from pipelines.tune.training import Step, Training

lab = begin("dpo-openchat")
use_all_cores()

# %% [markdown]
# ## Preferences
# The harmless test pairs of hh-rlhf, with the last question of each dialogue; three quarters to learn, a quarter kept back.
# They hold offensive text; nothing of it is shown here.

# %%
LONGEST = lab.pick(700, 160)
pairs = [pair for pair in texts.preferences() if len(pair[0]) + max(map(len, pair[1:])) <= LONGEST]
random.Random(small.SEED).shuffle(pairs)
pairs = pairs[: lab.pick(None, 60)]
cut = len(pairs) * 3 // 4
learn, kept_back = pairs[:cut], pairs[cut:]
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
chats, preferences = folder / "chats.jsonl", folder / "preferences.jsonl"
chats.write_text(
    "".join(
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": good}]}) + "\n"
        for q, good, _ in learn
    )
)
preferences.write_text("".join(json.dumps({"prompt": q, "chosen": good, "rejected": bad}) + "\n" for q, good, bad in learn))
openchat = small.make(
    "openchat",
    [text for pair in learn for text in pair],
    hidden_size=128,
    intermediate_size=lab.pick(352, 128),
    num_hidden_layers=lab.pick(4, 2),
    sliding_window=4096,
)
tokenizer = openchat.tokenizer


def trained(
    model: torch.nn.Module, recipe: Recipe, steps: list[list[Packed]], objective: Supervised | Preferences
) -> list[float]:
    """Train by the project's own loop and return the loss of each step."""
    losses: list[float] = []

    def on_step(step: Step) -> None:
        losses.append(step.loss)
        if step.step % max(1, step.steps // 4) == 0:
            lab.say(f"step {step.step}/{step.steps}: loss {step.loss:.3f}")

    Training(model, steps, recipe, objective, folder / f"checkpoint-{recipe.method}").run(on_step)
    return losses


# %% [markdown]
# ## First the replies, then the preference

# %%
COMMON = [
    "schedule.checkpoint_every_steps=100000",
    "held_out_share=0.0",
    "schedule.max_tokens=2048",
    "optimiser.weight_decay=0.0",
]
supervised = load_recipe(
    "full",
    [
        *COMMON,
        f"data={chats}",
        f"schedule.steps={lab.pick(200, 4)}",
        "schedule.rows_per_step=16",
        "schedule.rows_per_prompt=1",
        "optimiser.learning_rate=0.002",
    ],
)
prepared = source.prepare(supervised, tokenizer)
trained(openchat.model, supervised, prepared.steps, Supervised(tokenizer.pad_token_id))

dpo = load_recipe(
    "dpo",
    [
        *COMMON,
        f"data={preferences}",
        f"schedule.steps={lab.pick(150, 4)}",
        "schedule.rows_per_step=8",
        "optimiser.learning_rate=0.001",
    ],
)
assert dpo.preference
torch.manual_seed(small.SEED)
model = adapter.attach(openchat.model, Lora(rank=16, alpha=32, dropout=0.0), find("openchat").target_modules, quantised=False)
packed = [
    tree(encode_pair(Row(({"role": "user", "content": q}, {"role": "assistant", "content": good}), bad), tokenizer))
    for q, good, bad in kept_back
]


def scores() -> torch.Tensor:
    """Return the log-probabilities of the kept-back replies, [pairs, 2], the better one first."""
    model.eval()
    with torch.inference_mode():
        return torch.stack([log_probabilities(model, [pair], tokenizer.pad_token_id) for pair in packed])


reference = scores()
prepared = source.prepare(dpo, tokenizer)
objective = Preferences(model, prepared.steps, dpo.preference.beta, tokenizer.pad_token_id, folder / "reference.json")
losses = trained(model, dpo, prepared.steps, objective)
policy = scores()

# %% [markdown]
# ## What is preferred now
# The margin of a pair is how much more the better reply gained over the reference than the worse one.

# %%
margins = dpo.preference.beta * (policy - reference).diff(dim=1).neg().flatten()
lengths = torch.tensor(
    [
        [
            sum(label is not None for label in e.labels)
            for e in encode_pair(Row(({"role": "user", "content": q}, {"role": "assistant", "content": good}), bad), tokenizer)
        ]
        for q, good, bad in kept_back
    ]
).float()
longer = lengths[:, 0] - lengths[:, 1]
right = (margins > 0).float()
accuracy, error = float(right.mean()), 0.5 / len(right) ** 0.5
of_rule = {"longer": float((longer > 0).float().mean()), "shorter": float((longer < 0).float().mean())}
rule = max(of_rule, key=lambda name: of_rule[name])
ahead = right - ((longer > 0) if rule == "longer" else (longer < 0)).float()
lead, lead_error = float(ahead.mean()), float(ahead.std() / len(ahead) ** 0.5)
where_longer, where_shorter = float(right[longer > 0].mean()), float(right[longer < 0].mean())
correlation = float(torch.corrcoef(torch.stack([margins, longer]))[0, 1])
before = float((reference[:, 0] > reference[:, 1]).float().mean())
scratch.cleanup()

# %%
figure = Figure(figsize=(12, 3.8), layout="constrained")
first, second, third = figure.subplots(1, 3)
first.plot(range(1, len(losses) + 1), losses, linewidth=0.8)
first.axhline(math.log(2), color="0.5", linestyle="--", linewidth=0.8, label="ln 2")
first.set(title="DPO loss", xlabel="step", ylabel="nats")
first.legend()
bars = second.bar(
    ["DPO", f"always the\n{rule}", "DPO, better\nis longer", "DPO, better\nis shorter"],
    [accuracy, of_rule[rule], where_longer, where_shorter],
)
second.bar_label(bars, fmt="%.2f")
second.axhline(0.5, color="0.5", linestyle="--", linewidth=0.8)
second.set(title=f"Right on {len(right)} kept-back pairs", ylim=(0, 1))
second.tick_params(axis="x", labelsize=8)
third.scatter(longer, margins, s=6)
third.axhline(0, color="0.5", linewidth=0.8)
third.set(
    title=f"Margin and length (correlation {correlation:+.2f})",
    xlabel="tokens that the better reply is longer",
    ylabel="margin, nats",
)

# %%
setting = (
    f"a model of {openchat.parameters / 1e6:.1f} million parameters taught from nothing on {len(learn)} better "
    f"replies of hh-rlhf's harmless test "
    f"pairs, then {len(losses)} steps of {dpo.schedule.rows_per_step} pairs with an adapter of rank 16; {len(right)} "
    f"pairs kept back"
)
lab.conclude(
    {
        "start": judged(
            abs(losses[0] - math.log(2)) < 1e-3, f"{losses[0]:.4f} where ln 2 is {math.log(2):.4f}", setting, first_loss=losses[0]
        ),
        "learns": judged(
            accuracy > 0.5 + 2 * error,
            f"{accuracy:.0%} of the pairs (standard error of a coin {error:.1%}); by plain log-probability "
            f"the model before preferred {before:.0%}",
            setting + "; holds if over one half by two standard errors",
            accuracy=accuracy,
        ),
        "rule": judged(
            lead > 2 * lead_error,
            f"{accuracy:.0%} against {of_rule[rule]:.0%} of always taking the {rule} (standard error of the "
            f"difference {lead_error:.1%})",
            f"{setting}; holds if the difference is over two standard errors",
            accuracy=accuracy,
            accuracy_of_rule=of_rule[rule],
        ),
        "length": judged(
            abs(where_longer - where_shorter) <= 0.1,
            f"{where_longer:.0%} where it is longer ({int((longer > 0).sum())} pairs), "
            f"{where_shorter:.0%} where it is shorter ({int((longer < 0).sum())}); margin and length correlate "
            f"{correlation:+.2f}",
            setting,
            where_longer=where_longer,
            where_shorter=where_shorter,
            correlation=correlation,
        ),
    },
    figure,
)
