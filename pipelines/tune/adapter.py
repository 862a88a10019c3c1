"""The trained adapter as files: PEFT safetensors for vLLM and transformers, GGUF for llama.cpp, and the proof that it acts.

llama.cpp stores the rows of the query and key projections in another order than transformers (its rotary embedding pairs
neighbouring elements), so the rows of their `lora_B` are permuted the same way. Merging is not done here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.catalogue import Model
from pipelines.errors import TrainingFailed
from pipelines.tune.recipe import Lora

if TYPE_CHECKING:
    import numpy as np

ADAPTER_FOLDER = "adapter"
GGUF_FILE = "adapter.gguf"
PERMUTED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
MIN_LOGIT_CHANGE = 1e-3


def attach(base: Any, lora: Lora, target_modules: list[str], *, quantised: bool) -> Any:
    """Return a PEFT model with a fresh LoRA adapter on `target_modules`; the base stays frozen."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if quantised:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=next(base.parameters()).is_cuda,
                                               gradient_checkpointing_kwargs={"use_reentrant": False})  # fmt: skip
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=target_modules, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config)


def save(model: Any, entry: Model, folder: Path) -> None:
    """Write the adapter as PEFT files; the base is named by its hub id and revision, never by a path of this machine."""
    model.save_pretrained(folder, safe_serialization=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if entry.weights is not None:
        config |= {"base_model_name_or_path": entry.weights.hub, "revision": entry.weights.revision}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)  # a model card with empty fields


def to_gguf(folder: Path, base_config: Any, out: Path) -> None:
    """Write a PEFT adapter (`folder`) as a GGUF LoRA for llama.cpp.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        base_config: transformers configuration of the base; its architecture must be one that GGUF stores as "llama".
        out: the GGUF file.

    Raises:
        TrainingFailed: a tensor has no counterpart in llama.cpp's llama architecture.
    """
    import gguf
    from safetensors.numpy import load_file

    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, base_config.num_hidden_layers)
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))
    for key, tensor in sorted(load_file(folder / "adapter_model.safetensors").items()):
        module, matrix = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        target = names.get_name(module)
        if target is None or matrix not in ("lora_A", "lora_B"):
            raise TrainingFailed(f"{key} has no counterpart in llama.cpp", "LoRA on the projections of a llama-like decoder")
        if matrix == "lora_B":
            tensor = _as_llama_cpp_orders_rows(module, tensor, base_config)
        writer.add_tensor(f"{target}.weight.{matrix.lower()}", tensor.astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logit_change(model: Any, token_ids: list[int]) -> float:
    """Return the largest absolute change that the adapter makes to the next-token logits of a prompt."""
    import torch

    model.eval()
    ids = torch.tensor([token_ids], device=next(model.parameters()).device)
    with torch.no_grad():
        tuned = model(input_ids=ids, logits_to_keep=1).logits
        with model.disable_adapter():
            base = model(input_ids=ids, logits_to_keep=1).logits
    return float((tuned - base).abs().max())


def prove_effect(model: Any, token_ids: list[int]) -> float:
    """Return `logit_change`.

    Raises:
        TrainingFailed: the adapter changes nothing.
    """
    change = logit_change(model, token_ids)
    if change < MIN_LOGIT_CHANGE:
        raise TrainingFailed(f"the adapter changes no logit by more than {change:.1e}", f"at least {MIN_LOGIT_CHANGE}",
                             "raise schedule.steps or optimiser.learning_rate with --set")  # fmt: skip
    return change


def _as_llama_cpp_orders_rows(module: str, rows: np.ndarray, config: Any) -> np.ndarray:
    """Permute the rows of q and k, [out, rank], from transformers' half-split order to interleaved pairs, per head."""
    heads_field = PERMUTED.get(module.rsplit(".", 1)[-1])
    if heads_field is None:
        return rows
    heads = getattr(config, heads_field)
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)
