"""An embedder in 8 bits, run by ONNX Runtime: made once from the weights, kept in the cache of models.

Weights are rounded per channel, activations while it runs (dynamic quantisation); where the processor multiplies 8-bit numbers
with saturation (AVX2 without VNNI), a bit is left free. Beside the file lies its sha256, and a file that has another one is
made again.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import weights
from pipelines.hardware import usable_cpus
from pipelines.rag.embed import TokenEmbedder, fingerprint_of, load_model, padded, pooled
from pipelines.rag.embedders import EmbedderConfig
from pipelines.runs import disk_trouble_is_explained, write_text

if TYPE_CHECKING:
    import numpy as np

HOW = "int8 weights per channel in 7 bits, dynamic activations, opset 17"
OPSET = 17
MODEL, SHA256 = "model.onnx", "model.onnx.sha256"


class Int8(TokenEmbedder):
    """A model in 8 bits.

    Args:
        entry: of the catalogue.
        folder: of the weights that it is made from.
        threads: of the CPU, each with a batch of its own, which is a fifth faster than all of them on one batch; None for one
            for each core.
    """

    def __init__(self, entry: EmbedderConfig, folder: Path, threads: int | None = None) -> None:
        import onnxruntime

        super().__init__(entry, folder, hashlib.sha256(f"{fingerprint_of(entry, folder)} {HOW}".encode()).hexdigest())
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        self.batches_at_once = threads or usable_cpus()
        path = _made(entry, folder, self.fingerprint)
        self._session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])

    def run(self, tokens: list[list[int]]) -> np.ndarray:
        """Return the vectors of a batch; see `TokenEmbedder`."""
        ids, mask = padded(tokens)
        vectors: np.ndarray = self._session.run(None, {"ids": ids, "mask": mask})[0]
        return vectors


def _made(entry: EmbedderConfig, folder: Path, fingerprint: str) -> Path:
    """Return the ONNX file for a fingerprint, after making it where it is not or is another."""
    kept = weights.model_cache() / f"{entry.name}-{fingerprint[:16]}"
    if _is_whole(kept):
        return kept / MODEL
    with disk_trouble_is_explained(kept):
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept, prefix=".making-") as work:
            _quantise(folder, entry.pooling, Path(work))
            write_text(kept / SHA256, hashlib.sha256((Path(work) / MODEL).read_bytes()).hexdigest())
            (Path(work) / MODEL).replace(kept / MODEL)
    return kept / MODEL


def _is_whole(kept: Path) -> bool:
    try:
        return hashlib.sha256((kept / MODEL).read_bytes()).hexdigest() == (kept / SHA256).read_text(encoding="utf-8").strip()
    except OSError:
        return False


def _quantise(folder: Path, pooling: str, work: Path) -> None:
    """Write the model with its pooling as ONNX, in float32 and then in 8 bits."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    class Pooled(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return pooled(self.model, ids, mask, pooling)

    model = load_model(folder)
    model.set_attn_implementation("eager")
    ids = torch.tensor([[101, 2054, 2003, 102], [101, 2748, 102, 0]])
    free = {"ids": {0: "texts", 1: "length"}, "mask": {0: "texts", 1: "length"}, "vectors": {0: "texts"}}
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it recommends a step that changes nothing here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing, about shapes that are free by design
            torch.onnx.export(Pooled(model).eval(), (ids, (ids > 0).long()), str(work / "float32.onnx"), dynamo=False,
                              input_names=["ids", "mask"], output_names=["vectors"], dynamic_axes=free,
                              opset_version=OPSET)  # fmt: skip
            quantize_dynamic(
                work / "float32.onnx", work / MODEL, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True
            )
    finally:
        logging.root.setLevel(before)
