# %% [markdown]
# # Many languages with Qwen
# A model pays for each token: in time, in money, and in context. How many tokens does the same content take in other languages?
# The text is real and parallel: messages of GNU coreutils that people translated into every one of the languages below. The
# tokenizers are real: Qwen's from its maker's client, LLaMA 2's and SmolLM2's from packages of the base install.

# %%
import base64
from importlib.util import find_spec
from pathlib import Path

import tiktoken
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from labs.frame import texts
from labs.frame.session import begin
from labs.frame.verdict import judged, not_here
from pipelines import weights
from pipelines.architecture import config_of, on_meta
from pipelines.catalogue import all_models, runnable

lab = begin("multilingual-qwen")

# %%
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def inside(package: str, file: str) -> Path:
    """Return a file of an installed package without importing it."""
    found = find_spec(package)
    assert found and found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / file


pairs = (line.split() for line in inside("dashscope", "resources/qwen.tiktoken").read_bytes().splitlines())
ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
qwen = tiktoken.Encoding("qwen", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
llama = Tokenizer.from_file(str(inside("wordllama", "tokenizers/l2_supercat_tokenizer_config.json")))
llama.no_truncation()
llama.no_padding()
smol = AutoTokenizer.from_pretrained(weights.hf_directory(runnable("smollm2-135m")))

TOKENIZERS = {
    f"Qwen 2.5, {len(ranks)} tokens": lambda text: len(qwen.encode_ordinary(text)),
    f"LLaMA 2, {llama.get_vocab_size()} tokens": lambda text: len(llama.encode(text, add_special_tokens=False).ids),
    f"SmolLM2, {len(smol)} tokens": lambda text: len(smol(text, add_special_tokens=False)["input_ids"]),
}

# %% [markdown]
# ## Tokens for the same messages

# %%
languages = texts.translated_languages()[: lab.pick(None, 4)]
parallel = texts.translations(languages)
characters = {language: sum(map(len, messages)) for language, messages in parallel.items()}
counts = {
    name: {language: sum(map(count, messages)) for language, messages in parallel.items()} for name, count in TOKENIZERS.items()
}
of_qwen, of_llama, _ = counts.values()
to_llama = {language: of_qwen[language] / of_llama[language] for language in languages}
to_english = {language: of_qwen[language] / of_qwen["en"] for language in languages}
for language in parallel:
    lab.say(
        f"{language:6}"
        + ", ".join(f"{name.split(',')[0]} {characters[language] / by[language]:.2f}" for name, by in counts.items())
        + " characters for a token"
    )

# %% [markdown]
# ## What the vocabulary costs
# Rows of the embedding and of the output layer, as a share of all parameters. Small models feel it most.

# %%
shares = {}
for entry in all_models():
    if entry.name.startswith(lab.pick("qwen-2.5", "qwen-2.5-0.5b")) and entry.runnable:
        model = on_meta(config_of(entry))
        ends = {id(part.weight): part.weight.numel() for part in (model.get_input_embeddings(), model.get_output_embeddings())}
        shares[entry.name] = sum(ends.values()) / sum(p.numel() for p in model.parameters())
worst = max(shares, key=lambda name: shares[name])

# %%
figure = Figure(figsize=(10, 4), layout="constrained")
axes = figure.subplots()
order = ["en", *sorted(languages, key=lambda language: to_english[language])]
for place, (name, by) in enumerate(counts.items()):
    axes.bar([i + 0.27 * place for i in range(len(order))], [by[language] / by["en"] for language in order], 0.25, label=name)
axes.axhline(1.5, color="0.5", linewidth=0.8, linestyle="--")
axes.set_xticks([i + 0.27 for i in range(len(order))], order)
axes.set(title=f"Tokens for the same {len(parallel['en'])} messages", ylabel="times the tokens of English")
axes.legend(fontsize=8)

# %%
most, least = max(to_llama, key=lambda x: to_llama[x]), min(to_llama, key=lambda x: to_llama[x])
dear, cheap = max(to_english, key=lambda x: to_english[x]), min(to_english, key=lambda x: to_english[x])
on_text = (
    f"{len(parallel['en'])} messages of GNU coreutils, {characters['en']} characters in English, in {len(languages)} "
    f"other languages; "
    "Qwen's tokenizer as its maker's client ships it, of the size that Qwen 2.5's has"
)
lab.conclude(
    {
        "fewer": judged(
            max(to_llama.values()) < 1,
            f"fewer in {sum(ratio < 1 for ratio in to_llama.values())} of {len(languages)}: "
            f"{to_llama[least]:.2f} ({least}) to {to_llama[most]:.2f} ({most}) times as many; English "
            f"{of_qwen['en'] / of_llama['en']:.2f} times",
            on_text,
            **{f"to_llama_2_{language}": ratio for language, ratio in to_llama.items()},
        ),
        "parity": judged(
            max(to_english.values()) <= 1.5,
            f"{to_english[cheap]:.2f} ({cheap}) to {to_english[dear]:.2f} ({dear}) times the tokens "
            f"of English; {sum(ratio > 1.5 for ratio in to_english.values())} of {len(languages)} languages over 1.5",
            on_text,
            **{f"to_english_{language}": ratio for language, ratio in to_english.items()},
        ),
        "price": judged(
            max(shares.values()) <= 0.1,
            f"{min(shares.values()):.0%} to {shares[worst]:.0%}, most in {worst}",
            f"embedding and output layer, counted on {len(shares)} true architectures",
            largest_share=shares[worst],
        ),
        "reading": not_here(
            "no weights of Qwen and no questions in another language are on this machine",
            "llmlab pull qwen-2.5-7b and XQuAD in the other languages would allow it; SmolLM2, which is here, was made for "
            "English alone",
        ),
    },
    figure,
)
