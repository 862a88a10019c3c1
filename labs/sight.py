"""Whether a model that reads images really does: an image becomes tokens, and another image gives another answer.

The image goes through the family's own processor where it runs without torchvision, which has no build for a CPU; LLaMA 4's
does not, so its tokens are laid out here as that processor would. It looks at one small picture, and no quality is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.catalogue import Model
from pipelines.errors import TrainingFailed
from pipelines.tune.turns import load_tokenizer
from pipelines.weights import quiet_loading

QUESTION = "What is in the picture?"
SMALLEST_CHANGE = 1e-6


def look(entry: Model, folder: Path) -> str:
    """Show the model in `folder` two pictures and return what became of them, in words.

    Raises:
        TrainingFailed: the picture changes nothing, so the model does not see it.
    """
    import torch
    from transformers import AutoConfig

    from pipelines.architecture import loader

    config = AutoConfig.from_pretrained(folder)
    with quiet_loading():
        model = loader(config).from_pretrained(folder).eval()
    tokenizer = load_tokenizer(folder, entry)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    lay_out = LAYOUTS[config.model_type]
    answers, count = [], 0
    for brightness in (40, 200):
        inputs = lay_out(text, _picture(brightness), tokenizer, config)
        count = int((inputs["input_ids"] == _image_token(config)).sum())
        with torch.inference_mode():
            answers.append(model(**inputs).logits[0, -1].float())
    change = float((answers[0] - answers[1]).abs().max())
    if not count or change < SMALLEST_CHANGE:
        raise TrainingFailed(
            f"{entry.name} does not see the picture: {count} tokens, logits move by {change:.1g}", "an image token"
        )
    return f"{count} image token{'s' * (count > 1)}"


def _image_token(config: Any) -> int:
    return int(
        next(value for name in ("image_token_id", "image_token_index") if (value := getattr(config, name, None)) is not None)
    )


def _picture(brightness: int) -> Any:
    from PIL import Image

    picture = Image.new("RGB", (96, 64), (brightness, 90, 160))
    picture.paste((250, brightness, 20), (20, 10, 60, 50))
    return picture


def _gemma3(text: str, picture: Any, tokenizer: Any, config: Any) -> Any:
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    side = config.vision_config.image_size
    images = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=config.mm_tokens_per_image)
    return processor(images=[[picture]], text=[text], return_tensors="pt", add_special_tokens=False)


def _mllama(text: str, picture: Any, tokenizer: Any, config: Any) -> Any:
    from transformers import MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    side = config.vision_config.image_size
    images = MllamaImageProcessorPil(size={"height": side, "width": side}, max_image_tiles=config.vision_config.max_num_tiles)
    return MllamaProcessor(images, tokenizer)(images=[[picture]], text=[text], return_tensors="pt", add_special_tokens=False)


def _llama4(text: str, picture: Any, tokenizer: Any, config: Any) -> Any:
    import numpy as np
    import torch

    eyes = config.vision_config
    side = eyes.image_size
    patches = int((side // eyes.patch_size) ** 2 * eyes.pixel_shuffle_ratio**2)
    laid = text.replace("<|image|>", "<|image_start|><|image|>" + "<|patch|>" * patches + "<|image_end|>")
    pixels = np.asarray(picture.resize((side, side)), dtype=np.float32) / 127.5 - 1
    ids = tokenizer(laid, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "pixel_values": torch.from_numpy(pixels).permute(2, 0, 1)[None]}


LAYOUTS: dict[str, Callable[[str, Any, Any, Any], Any]] = {"gemma3": _gemma3, "mllama": _mllama, "llama4": _llama4}
