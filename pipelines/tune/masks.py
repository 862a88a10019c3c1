"""The mask of packed rows in the form that an architecture wants: windows, chunks, and numbers where it adds them.

A mask that is given to a decoder takes the place of its own, so what its layers may not see has to be in it: rows of others,
and, in layers with a sliding window or in chunks, what is too far away. Distance is that of positions, not of places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.architecture import CHUNKED, FULL, layer_kinds, window_of

if TYPE_CHECKING:
    import torch


def of_layers(mask: torch.Tensor, positions: torch.Tensor, text: Any, dtype: torch.dtype) -> Any:
    """Return the mask, or a mapping of one for each kind of layer where there are several.

    Args:
        mask: [B, 1, T, T], True where a place may look.
        positions: [B, T], of the tokens in their rows.
        text: configuration of the decoder.
        dtype: of the model, for an attention that adds the mask to its scores.
    """
    kinds = dict.fromkeys(layer_kinds(text))
    made = {kind: _added(_within(mask, positions, kind, window_of(text)), text, dtype) for kind in kinds}
    return made if len(made) > 1 else next(iter(made.values()))


def _within(mask: torch.Tensor, positions: torch.Tensor, kind: str, window: int) -> torch.Tensor:
    if kind == FULL or not window or mask.is_meta:
        return mask
    query, key = positions[:, None, :, None], positions[:, None, None, :]
    near = query // window == key // window if kind == CHUNKED else query - key < window
    return mask & near


def _added(mask: torch.Tensor, text: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 where a place may look and a large negative number elsewhere, where the attention adds its mask."""
    import torch

    if getattr(text, "_attn_implementation", None) != "eager":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
