"""A catalogue entry's architecture as transformers knows it: its configuration, its model on the meta device, its KV cache.

`config:` of an entry is what transformers' own configuration would say, so every architecture of the installed transformers
is built from it, the true one without memory or the shrunk one of a rehearsal. Nothing here loads weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipelines.catalogue import Model
from pipelines.errors import ConfigError

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
BYTES_OF_16_BITS = 2


@dataclass(frozen=True)
class Cache:
    """Keys and values that a sequence leaves behind, counted in numbers.

    Attributes:
        whole: of a token, in all layers that see the whole text.
        windowed: of a token, in all layers that see a window only.
        window: of these layers, in tokens; 0 if there are none.
    """

    whole: int
    windowed: int = 0
    window: int = 0

    def bytes(self, tokens: int, size: float = BYTES_OF_16_BITS) -> int:
        """Return what a sequence of `tokens` takes, at `size` bytes for each number."""
        return int(size * (self.whole * tokens + self.windowed * min(tokens, self.window)))

    def longest(self, room_bytes: int, size: float = BYTES_OF_16_BITS) -> int:
        """Return the longest sequence, in tokens, for which there is room."""
        both = int(max(0, room_bytes) // (size * (self.whole + self.windowed)))
        if both <= self.window or not self.windowed:
            return both
        return int((room_bytes - size * self.windowed * self.window) // (size * self.whole)) if self.whole else 2**62


def config_of(entry: Model, over: dict[str, Any] | None = None) -> Any:
    """Return the transformers configuration of an entry.

    Args:
        entry: a runnable catalogue entry.
        over: fields, also of inner configurations, that take the place of the entry's.

    Raises:
        ConfigError: transformers does not know the architecture, or not these fields.
    """
    from transformers import AutoConfig

    assert entry.config is not None  # runnable
    fields = _put_over(entry.config, over or {})
    kind = fields.pop("model_type")
    try:
        with _silent():
            return AutoConfig.for_model(kind, **fields)
    except (ValueError, TypeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        came = f"transformers cannot make a configuration of {entry.name}: {first}"
        raise ConfigError(came, "a model_type and fields it knows", f"edit configs/models/{entry.name}.yaml") from None


@contextmanager
def _silent() -> Iterator[None]:
    """Keep to itself what transformers thinks of the makers' own values, such as LLaMA 4's rope_parameters."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def loader(config: Any) -> Any:
    """Return the auto class whose `from_config` and `from_pretrained` make the whole model, with its eyes if it has any."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def on_meta(config: Any) -> Any:
    """Return the model on the meta device, which takes no memory: in float32, or bfloat16 for experts, whose kernel wants it."""
    import torch

    experts = getattr(config.get_text_config(), "num_local_experts", 0)
    with torch.device("meta"):
        return loader(config).from_config(config, dtype=torch.bfloat16 if experts else torch.float32)


def layers_of(model: Any) -> Any:
    """Return the list of a model's decoder layers, whatever its family calls it."""
    import torch

    lists = [child for child in decoder_of(model).children() if isinstance(child, torch.nn.ModuleList)]
    return max(lists, key=len)


def decoder_of(model: Any) -> Any:
    """Return the part of a model that makes hidden states of tokens; LLaMA 4's own answer still has the output layer on it."""
    decoder = model.get_decoder()
    return decoder.model if hasattr(decoder, "lm_head") else decoder


def cache_of(config: Any) -> Cache:
    """Return how the KV cache of an architecture grows with the text; that of images is not in it."""
    text = config.get_text_config()
    heads = _kv_heads(text)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = layer_kinds(text)
    crossing = len(getattr(text, "cross_attention_layers", None) or ())
    a_layer = 2 * heads * width
    whole = kinds.count(FULL) - crossing
    window = window_of(text)
    return Cache(a_layer * whole, a_layer * (len(kinds) - crossing - whole), window) if window else Cache(
        a_layer * (len(kinds) - crossing))  # fmt: skip


def layer_kinds(text: Any) -> list[str]:
    """Return for each layer of a text configuration what it sees: all, a window, or its chunk."""
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return list(kinds)
    return [SLIDING if window_of(text) else FULL] * text.num_hidden_layers


def window_of(text: Any) -> int:
    """Return how many tokens a layer sees that does not see all; 0 if every layer does."""
    if getattr(text, "use_sliding_window", True) is False:
        return 0
    return int(getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None) or 0)


def takes_positions(config: Any) -> bool:
    """Return False for an architecture that knows places by where they lie, so that rows cannot share a prompt (ALiBi)."""
    attention = getattr(config, "attn_config", None)
    return not (getattr(attention, "alibi", False) or getattr(config, "alibi", False))


def _kv_heads(text: Any) -> int:
    """Return the heads of keys and values; Falcon has a name of its own for them, and an older form with one."""
    if text.model_type == "falcon":
        return int(text.num_kv_heads if text.new_decoder_architecture or not text.multi_query else 1)
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def _put_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Put fields over others, inner configurations too; an inner configuration that is null is left out."""
    both = {key: _put_over(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
            for key, value in above.items()}  # fmt: skip
    return {key: value for key, value in (below | both).items() if value is not None or not key.endswith("_config")}
