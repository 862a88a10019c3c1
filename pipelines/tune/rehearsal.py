"""A stand-in to rehearse a recipe on: the real architecture class, shrunk, with random weights and a tokenizer made here.

It proves that data, template, recipe, quantisation and export work for a family whose weights are not at hand. What it
generates means nothing, and everything made from it is marked as a rehearsal.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.architecture import config_of, loader
from pipelines.catalogue import Model, SpecialTokens
from pipelines.errors import DataError
from pipelines.tune.data import KNOWLEDGE
from pipelines.weights import quiet_loading

VOCABULARY = 2048
SEED = 5
OPENED = 0.02  # spread of what a family begins with zeros, such as the way from its eyes, which would hide a fault behind it
PIECES_FILE = "tokenizer.model"  # the makers' files bring it too, and llama.cpp's converter asks for it
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space


def build(entry: Model, texts: Iterable[str], folder: Path) -> Path:
    """Write the shrunk model and its tokenizer to `folder` as `from_pretrained` reads them; return the folder.

    Args:
        entry: a runnable catalogue entry.
        texts: what the tokenizer is trained on.
        folder: is created.
    """
    import torch

    if not entry.runnable:
        raise DataError(f"the catalogue has no rehearsal size for {entry.name}", "an open model", f"llmlab show {entry.name}")
    tokenizer = train_tokenizer(entry, texts)
    config = shrunk_config(entry, tokenizer)
    torch.manual_seed(SEED)
    model = loader(config).from_config(config)
    for name, parameter in model.named_parameters():
        if not parameter.any() and (parameter.dim() > 1 or "gate" in name):
            torch.nn.init.normal_(parameter, std=OPENED)
    with quiet_loading():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_pieces(entry, tokenizer, folder)
    return folder


def write_pieces(entry: Model, tokenizer: Any, folder: Path) -> None:
    """Write SentencePiece's own file beside a tokenizer of a family that has one; llama.cpp's converter asks for it."""
    if entry.rehearsal and entry.rehearsal.tokenizer == "pieces":
        (folder / PIECES_FILE).write_bytes(_as_sentencepiece(tokenizer, entry.rehearsal.special_tokens))


def texts() -> list[str]:
    """Return the pages of the knowledge base, what the tokenizer of a rehearsal is trained on."""
    return [path.read_text(encoding="utf-8") for path in sorted(KNOWLEDGE.glob("*.md"))]


def shrunk_config(entry: Model, tokenizer: Any) -> Any:
    """Return the architecture's own configuration with the rehearsal's size; everything else stays as the real one."""
    assert entry.rehearsal and entry.config  # runnable
    size = entry.rehearsal
    own = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    over = dict(size.config)
    if "text_config" in entry.config and over.get("text_config") is not None:
        over["text_config"] = over["text_config"] | own
    else:
        over |= own
    return config_of(entry, over | {field: tokenizer.convert_tokens_to_ids(t) for field, t in (size.token_ids or {}).items()})


def train_tokenizer(entry: Model, texts: Iterable[str]) -> Any:
    """Return a BPE tokenizer that cuts text as the family does, with its chat template and special tokens."""
    from tokenizers import trainers
    from transformers import PreTrainedTokenizerFast

    assert entry.rehearsal and entry.chat_template  # runnable
    special = entry.rehearsal.special_tokens
    tokenizer, alphabet = (_of_bytes if entry.rehearsal.tokenizer == "bytes" else _of_pieces)(special)
    further, letters = alphabet
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=_names(special) + further, initial_alphabet=letters,
                                  show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special.bos, eos_token=special.eos, pad_token=special.pad or special.eos,
        unk_token=special.unknown, extra_special_tokens=special.others, model_specific_special_tokens=special.named,
        chat_template=entry.chat_template,
    )  # fmt: skip


def _names(special: SpecialTokens) -> list[str]:
    given = [special.unknown, special.bos, special.eos, special.pad, *special.others]
    return list(dict.fromkeys(token for token in given if token))


def _of_bytes(special: SpecialTokens) -> tuple[Any, tuple[list[str], list[str]]]:
    """Return (tokenizer, (further tokens, alphabet)) of byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(unk_token=special.unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, ([], pre_tokenizers.ByteLevel.alphabet())


def _of_pieces(special: SpecialTokens) -> tuple[Any, tuple[list[str], list[str]]]:
    """Return the same of SentencePiece's BPE: spaces are a letter, and what has no token is spelt in bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(unk_token=special.unknown, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    lines = pre_tokenizers.Split("\n", "isolated")  # no piece of a family's own tokenizer goes over the end of a line
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Split(SPACE, "merged_with_next")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer, ([f"<0x{byte:02X}>" for byte in range(256)], [])


def _as_sentencepiece(tokenizer: Any, special: SpecialTokens) -> bytes:
    """Return the same tokens as a file of SentencePiece: an earlier merge has the higher score."""
    from transformers.utils import sentencepiece_model_pb2_new as proto

    kinds = proto.ModelProto.SentencePiece.Type
    model = proto.ModelProto()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        kind = (kinds.UNKNOWN if token == special.unknown else kinds.CONTROL if token in _names(special)
                else kinds.BYTE if token.startswith("<0x") else kinds.NORMAL)  # fmt: skip
        model.pieces.add(piece=token, score=-float(number) if kind == kinds.NORMAL else 0.0, type=kind)
    trained = model.trainer_spec
    trained.model_type, trained.vocab_size, trained.byte_fallback = trained.ModelType.BPE, len(model.pieces), True
    trained.unk_id, trained.bos_id = tokenizer.unk_token_id, tokenizer.bos_token_id
    trained.eos_id, trained.pad_id = tokenizer.eos_token_id, -1
    model.normalizer_spec.name, model.normalizer_spec.add_dummy_prefix = "identity", False
    model.normalizer_spec.remove_extra_whitespaces = False
    return bytes(model.SerializeToString())
