"""A GGUF file -> the same in another quantisation, block by block, with ggml's own routine from the llama.cpp wheel.

Projections take the type that was asked for; embeddings and output layer keep at least six bits, as llama.cpp's quantiser
has it. What is not a matrix stays as it is, and so do the matrices that its quantiser leaves alone: norms of single heads, the
gates that choose experts, and positions. K-quants come in blocks of 256; a matrix whose rows are no multiple of that
takes the nearest type in blocks of 32.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UnknownName

if TYPE_CHECKING:
    import numpy as np

F16 = "f16"
FILE_TYPES = {F16: "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q6_k": "MOSTLY_Q6_K", "q5_k": "MOSTLY_Q5_K_S", "q5_1": "MOSTLY_Q5_1",
              "q5_0": "MOSTLY_Q5_0", "q4_k": "MOSTLY_Q4_K_S", "q4_1": "MOSTLY_Q4_1", "q4_0": "MOSTLY_Q4_0"}  # fmt: skip
WITHOUT_K = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0"}  # llama.cpp's own choice for rows that 256 does not divide
SIX_BITS = "Q6_K"
AT_LEAST_SIX_BITS = ("F16", "Q8_0", SIX_BITS)
KEPT_PRECISE = ("token_embd.weight", "output.weight")
LEFT_ALONE = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight")
K_BLOCK = 256

Progress = Callable[[str, int, int], None]


def choices() -> list[str]:
    """Return the names of all quantisations, the most precise first."""
    return list(FILE_TYPES)


def check(name: str) -> None:
    """Raise `UnknownName` unless `name` is one of `choices`."""
    if name not in choices():
        raise UnknownName(f"there is no quantisation named {name!r}", f"one of {', '.join(choices())}", "llmlab export --help")


def is_in(file: Path, name: str) -> bool:
    """Tell whether a GGUF file says by its name that it is in a quantisation: `Model.Q4_1.gguf` is in q4_1."""
    return file.stem.lower().endswith(name)


def quantise(source: Path, out: Path, name: str, progress: Progress) -> None:
    """Write `source`, a GGUF file, as `out`.

    Args:
        source: what is read, usually in 16 bits; what was rounded to fewer stays as inexact as it is.
        out: what is written.
        name: one of `choices`.
        progress: is told (stage, tensors done, tensors).
    """
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(out, architecture, use_temp_file=True)
    for field in reader.fields.values():
        if field.name in (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE) or field.name.startswith("GGUF."):
            continue
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=field.types[-1] if array else None)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[name]])
    for done, tensor in enumerate(reader.tensors, 1):
        kind = type_of(tensor.name, tuple(map(int, reversed(tensor.shape))), name)
        if kind is None:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, blocks(rows, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
        progress(f"quantising to {name}", done, len(reader.tensors))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def type_of(tensor: str, shape: tuple[int, ...], name: str) -> str | None:
    """Return the ggml type that a tensor gets, or None if it stays as it is; the last of `shape` is the length of a row."""
    if len(shape) < 2 or not tensor.endswith(".weight") or tensor.endswith(LEFT_ALONE):
        return None
    kind = name.upper()
    if tensor in KEPT_PRECISE and kind not in AT_LEAST_SIX_BITS:
        kind = SIX_BITS
    if shape[-1] % K_BLOCK:
        kind = WITHOUT_K.get(kind, kind)
    return kind


def blocks(rows: np.ndarray, kind: str) -> np.ndarray:
    """Return float rows [..., n] as the bytes of a ggml type, uint8 [..., bytes of a row]."""
    import gguf
    import numpy as np

    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    source = np.ascontiguousarray(rows, dtype=np.float32)
    width = source.shape[-1]
    made = np.empty((*source.shape[:-1], width // block * size), dtype=np.uint8)
    count = source.size // width
    convert = _ggml().ggml_quantize_chunk
    share = -(-count // (os.cpu_count() or 1))

    def part(first: int) -> None:
        convert(number, source.ctypes.data, made.ctypes.data, first * width, min(share, count - first), width, None)

    with ThreadPoolExecutor() as threads:
        list(threads.map(part, range(0, count, share)))
    return made


def _ggml() -> Any:
    import xllamacpp.xllamacpp

    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
