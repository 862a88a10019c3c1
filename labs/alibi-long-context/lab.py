# %% [markdown]
# # Beyond the training length with ALiBi
# MPT knows no positions. Attention pays a penalty for each token of distance, steeper in some heads than in others (Press et al.
# 2021, arXiv 2108.12409), and its makers stretched a model of 2,048 tokens to 65,536 that way. Here three small models learn the
# same real text from pieces of the same length, and then read much longer ones: MPT's architecture with ALiBi, LLaMA 2's with
# rotary positions, and GPT-2's with learned ones.

# %%
import torch
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM

from labs.frame import small, texts
from labs.frame.session import begin
from labs.frame.verdict import judged
from pipelines.architecture import config_of
from pipelines.catalogue import find
from pipelines.hardware import use_all_cores

lab = begin("alibi-long-context")
use_all_cores()

# %% [markdown]
# ## Text
# Python's manual and modules of its library, byte by byte; every tenth text is kept back.

# %%
TRAINED = lab.pick(128, 32)
TIMES = 8
LONG = TRAINED * TIMES
written = texts.manual() + texts.library(lab.pick(600_000, 60_000))
kept_back = written[::10]
width, layers = lab.pick((128, 4), (64, 2))
alibi = small.make("mpt-7b-storywriter", [], d_model=width, n_layers=layers, n_heads=8, max_seq_len=LONG)
tokenizer = alibi.tokenizer
rotary = small.make(
    "llama-2",
    [],
    tokenizer,
    hidden_size=width,
    intermediate_size=lab.pick(352, 176),
    num_hidden_layers=layers,
    num_attention_heads=8,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
torch.manual_seed(small.SEED)
learned = AutoModelForCausalLM.from_config(
    AutoConfig.for_model(
        "gpt2",
        n_embd=width,
        n_layer=layers,
        n_head=8,
        n_positions=LONG,
        vocab_size=len(tokenizer),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
)
MODELS = {"ALiBi (MPT)": alibi.model, "rotary (LLaMA 2)": rotary.model, "learned (GPT-2)": learned}
short = small.blocks([text for i, text in enumerate(written) if i % 10], tokenizer, TRAINED)
long = small.blocks(kept_back, tokenizer, LONG)[: lab.pick(64, 8)]
lab.say(f"{short.numel()} bytes to learn in pieces of {TRAINED}, {len(long)} pieces of {LONG} kept back")

# %% [markdown]
# ## Learn short, read long

# %%
STEPS = lab.pick(350, 10)
by_place = {}
for name, model in MODELS.items():
    small.teach(model, short, STEPS, batch=16, rate=2e-3, say=lab.say)
    by_place[name] = small.losses(model, long)
    parts = by_place[name].mean(0).view(TIMES, TRAINED).mean(1).tolist()
    lab.say(f"{name}: loss by multiples of the training length " + " ".join(f"{loss:.2f}" for loss in parts))

# %% [markdown]
# ## The same bytes, near and far
# The last bytes of each long piece, half a training length of them: once at their place, with all that stands before them, and
# once read within the training length, with no more than that before them.

# %%
half = TRAINED // 2
rise: dict[str, float] = {}
error: dict[str, float] = {}
for name, model in MODELS.items():
    near = small.losses(model, long[:, -TRAINED - 1 :])[:, -half:]
    more = (by_place[name][:, -half:] - near).mean(1)
    rise[name], error[name] = float(more.mean()), float(more.std() / len(more) ** 0.5)
    lab.say(f"{name}: {rise[name]:+.3f} nats at its place, standard error {error[name]:.3f}")

# %% [markdown]
# ## StoryWriter's own slopes
# Two models of the same weights that differ in `alibi_bias_max` only must not say the same.

# %%
story, other = (
    config_of(
        find("mpt-7b-storywriter"),
        {
            "d_model": 64,
            "n_layers": 1,
            "n_heads": 8,
            "max_seq_len": 256,
            "vocab_size": 512,
            "attn_config": {"alibi_bias_max": most},
        },
    )
    for most in (16, 8)
)
with_16, with_8 = AutoModelForCausalLM.from_config(story).eval(), AutoModelForCausalLM.from_config(other).eval()
with_8.load_state_dict(with_16.state_dict())
ids = torch.arange(256)[None]
with torch.inference_mode():
    difference = float((with_16(input_ids=ids).logits - with_8(input_ids=ids).logits).abs().max())

# %%
figure = Figure(figsize=(9, 4), layout="constrained")
axes = figure.subplots()
for name, loss in by_place.items():
    smooth = loss.mean(0).view(-1, TRAINED // 4).mean(1)
    axes.plot([(i + 0.5) * TRAINED // 4 for i in range(len(smooth))], smooth, label=name)
axes.axvline(TRAINED, color="0.5", linestyle="--", linewidth=0.8)
axes.text(TRAINED, axes.get_ylim()[1], " training length", va="top", fontsize=8, color="0.4")
axes.set(title=f"Loss by place in texts of {LONG} bytes", xlabel="place in the text, bytes", ylabel="loss, nats per byte")
axes.legend()

# %%
first, *rest = rise
setting = (
    f"models of {alibi.parameters / 1e6:.1f} million parameters, {STEPS} steps of 16 pieces of {TRAINED} bytes of "
    f"Python's manual "
    f"and library; the last {half} bytes of {len(long)} kept-back pieces of {LONG}, with all of the text before them "
    "against the same bytes within the training length"
)
lab.conclude(
    {
        "beyond": judged(
            rise[first] <= 2 * error[first],
            f"{rise[first]:+.3f} nats a byte (standard error {error[first]:.3f}) at eight times the training length",
            setting,
            rise_nats=rise[first],
            standard_error_nats=error[first],
        ),
        "others": judged(
            min(rise[name] for name in rest) >= 0.5,
            ", ".join(f"{name} {rise[name]:+.2f} nats" for name in rest),
            setting,
            rotary_rise_nats=rise[rest[0]],
            learned_rise_nats=rise[rest[1]],
        ),
        "uses": judged(
            rise[first] < -2 * error[first],
            f"{rise[first]:+.3f} nats a byte (standard error {error[first]:.3f}) with what stands further back",
            f"{setting}; holds if the loss falls by over two standard errors",
            change_nats=rise[first],
            standard_error_nats=error[first],
        ),
        "slopes": judged(
            difference > 1e-4,
            f"with 16 and with 8 the logits differ by {difference:.1g} at most",
            "two small models with the same weights; in transformers as it is installed here",
            difference=difference,
        ),
    },
    figure,
)
