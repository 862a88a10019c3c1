"""A stand-in to rehearse a recipe on: the real architecture class, shrunk, with random weights and a tokenizer made here.

It proves that data, template, recipe, quantisation and export work for a family whose weights are not at hand. What it
generates means nothing, and everything made from it is marked as a rehearsal.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.catalogue import Dimensions, Model, Rehearsal
from pipelines.errors import DataError
from pipelines.tune.data import KNOWLEDGE
from pipelines.weights import quiet_loading

VOCABULARY = 2048
SEED = 5


def build(entry: Model, texts: Iterable[str], folder: Path) -> Path:
    """Write the shrunk model and its tokenizer to `folder` as `from_pretrained` reads them; return the folder.

    Args:
        entry: a runnable catalogue entry.
        texts: what the tokenizer is trained on.
        folder: is created.
    """
    import torch
    import transformers

    if entry.rehearsal is None or entry.dimensions is None:
        raise DataError(
            f"the catalogue has no rehearsal size for {entry.name}", "dimensions and rehearsal", f"llmlab show {entry.name}"
        )
    tokenizer = train_tokenizer(entry.rehearsal, texts)
    config = shrunk_config(entry.dimensions, entry.rehearsal, tokenizer)
    torch.manual_seed(SEED)
    model = getattr(transformers, entry.dimensions.architecture)(config)
    with quiet_loading():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def texts() -> list[str]:
    """Return the pages of the knowledge base, what the tokenizer of a rehearsal is trained on."""
    return [path.read_text(encoding="utf-8") for path in sorted(KNOWLEDGE.glob("*.md"))]


def shrunk_config(dimensions: Dimensions, size: Rehearsal, tokenizer: Any) -> Any:
    """Return the architecture's own configuration with the rehearsal's size; everything else stays as the real one."""
    smaller = size.model_dump(exclude={"chat_template", "special_tokens"}) | {"vocabulary": len(tokenizer)}
    return architecture_config(
        dimensions.model_copy(update=smaller),
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def architecture_config(dimensions: Dimensions, **token_ids: int) -> Any:
    """Return the transformers configuration of a catalogue entry."""
    import transformers

    kind = getattr(transformers, dimensions.architecture).config_class
    settings = {} if dimensions.architecture == "LlamaForCausalLM" else {"sliding_window": None}
    return kind(
        num_hidden_layers=dimensions.layers, hidden_size=dimensions.hidden, intermediate_size=dimensions.intermediate,
        num_attention_heads=dimensions.heads, num_key_value_heads=dimensions.kv_heads, vocab_size=dimensions.vocabulary,
        tie_word_embeddings=dimensions.tied_embeddings, max_position_embeddings=dimensions.context_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": dimensions.rope_theta}, **settings, **token_ids,
    )  # fmt: skip


def train_tokenizer(size: Rehearsal, texts: Iterable[str]) -> Any:
    """Return a byte-level BPE tokenizer with the family's chat template and special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = size.special_tokens
    tokenizer = Tokenizer(models.BPE(unk_token=special.unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[special.unknown, special.bos, special.eos],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special.bos, eos_token=special.eos, pad_token=special.eos,
        unk_token=special.unknown, chat_template=size.chat_template,
    )  # fmt: skip
