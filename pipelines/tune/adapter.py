"""The adapter: put on a base, saved as PEFT safetensors for vLLM and transformers, and as GGUF for llama.cpp.

llama.cpp stores the rows of the query and key projections in another order than transformers (its rotary embedding pairs
neighbouring elements), so the rows of their `lora_B` are permuted the same way. Merging is not done here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.catalogue import Model
from pipelines.errors import ConfigError, TrainingFailed
from pipelines.tune.recipe import Lora

if TYPE_CHECKING:
    import numpy as np

ADAPTER_FOLDER = "adapter"
GGUF_FILE = "adapter.gguf"
PERMUTED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
VLLM_MAX_RANK = 512
GGUF_LLAMA = ("llama", "mistral")


def attach(
    base: Any, lora: Lora, target_modules: list[str], *, quantised: bool, dora: bool = False, checkpointing: bool = False,
    experts: Sequence[str] = (), frozen: Sequence[str] = (),
) -> Any:  # fmt: skip
    """Return a PEFT model with a fresh adapter on `target_modules`; the base stays frozen.

    Args:
        base: a causal language model.
        lora: shape of the adapter.
        target_modules: names of the projections that get one.
        quantised: the base is in NF4.
        dora: learn magnitude and direction apart (Liu et al. 2024, arXiv 2402.09353).
        checkpointing: compute activations twice instead of keeping them.
        experts: stacked weights of experts that get one too; PEFT knows no dropout for them, so there is none then.
        frozen: parts of the model that get none.

    Raises:
        ConfigError: a target is no projection of the base; PEFT would pass over it as long as another one is.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(base, target_modules, experts, frozen)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0 if experts else lora.dropout,
                        target_modules=target_modules, target_parameters=list(experts) or None,
                        exclude_modules=_below(frozen) if frozen else None, use_dora=dora, task_type="CAUSAL_LM")  # fmt: skip
    return get_peft_model(ready(base, quantised=quantised, checkpointing=checkpointing), config)


def _below(frozen: Sequence[str]) -> str:
    """Return the expression for the full name of every module in one of these parts."""
    return rf"(.*\.)?({'|'.join(map(re.escape, frozen))})(\..*)?"


def _check_targets(base: Any, target_modules: list[str], experts: Sequence[str], frozen: Sequence[str]) -> None:
    apart = re.compile(_below(frozen))
    modules = [name for name, module in base.named_modules() if "Linear" in type(module).__name__]
    there = {name.rsplit(".", 1)[-1] for name in modules if not (frozen and apart.fullmatch(name))}
    missing = sorted(set(target_modules) - there)
    missing += sorted(name for name in experts if not any(p.endswith(f".{name}") for p, _ in base.named_parameters()))
    if missing:
        came = f"{type(base).__name__} has no projection named {', '.join(missing)}"
        way_on = "edit tuning in the model's file below configs/models"
        raise ConfigError(came, f"some of {', '.join(sorted(there))}", way_on)


def ready(base: Any, *, quantised: bool, checkpointing: bool) -> Any:
    """Return the base prepared for training: norms in float32 where it is quantised, checkpointing where it is wanted."""
    from peft import prepare_model_for_kbit_training

    if quantised:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    if checkpointing:
        checkpoint_activations(base)
    return base


def checkpoint_activations(model: Any) -> None:
    """Let a model compute its activations twice instead of keeping them (Chen et al. 2016, arXiv 1604.06174)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.activation_checkpointing_enable({"use_reentrant": False})


def resume(base: Any, folder: Path, *, quantised: bool, checkpointing: bool) -> Any:
    """Return the base with a saved adapter that goes on learning; without dropout, so that a reference can be exact."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(folder)
    config.lora_dropout = 0.0
    base = ready(base, quantised=quantised, checkpointing=checkpointing)
    return PeftModel.from_pretrained(base, folder, config=config, is_trainable=True)


def servable(method: str, lora: Lora | None, entry: Model) -> dict[str, str]:
    """Return for each engine "yes", or why it cannot serve what the method makes of the model beside its base."""
    if method == "full":
        return dict.fromkeys(("llamacpp", "vllm"), "no: it is a model of its own, which llmlab export makes ready")
    if method == "dora":
        return dict.fromkeys(("llamacpp", "vllm"), "no: engines apply plain LoRA only; llmlab export merges it")
    rank = lora.rank if lora else 0
    merged = "no: adapters of this architecture are not written as GGUF; llmlab export merges it"
    answers = {
        "llamacpp": "yes" if has_gguf(entry) else merged,
        "vllm": "yes" if rank <= VLLM_MAX_RANK else f"no: rank {rank} is over its limit of {VLLM_MAX_RANK}",
    }
    if entry.tuning and entry.tuning.expert_parameters:
        answers = dict.fromkeys(answers, "no: adapters of stacked experts are PEFT's own form; llmlab export merges it")
    unknown = "no: it does not know this architecture"
    return {engine: said if entry.serving and engine in entry.serving.engines else unknown for engine, said in answers.items()}


def has_gguf(entry: Model) -> bool:
    """Return True if an adapter of the model is written for llama.cpp: its architecture is one that GGUF calls "llama"."""
    kind = entry.config["model_type"] if entry.config else None
    return kind in GGUF_LLAMA and not (entry.tuning and entry.tuning.expert_parameters)


def save(model: Any, entry: Model, folder: Path) -> None:
    """Write the adapter as PEFT files; the base is named by its hub id and revision, never by a path of this machine."""
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if entry.weights is not None:
        config |= {"base_model_name_or_path": entry.weights.hub, "revision": entry.weights.revision}  # null if not pinned
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


def _as_llama_cpp_orders_rows(module: str, rows: np.ndarray, config: Any) -> np.ndarray:
    """Permute the rows of q and k, [out, rank], from transformers' half-split order to interleaved pairs, per head."""
    heads_field = PERMUTED.get(module.rsplit(".", 1)[-1])
    if heads_field is None:
        return rows
    heads = getattr(config, heads_field)
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)
