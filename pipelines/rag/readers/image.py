"""Pictures of text: OCR by the PP-OCR models that come with RapidOCR, on the CPU; nothing is fetched.

Lines are joined from top to bottom, and on one height from left to right: columns are not told apart.
Run as a part of: make index DOCS=path/to/folder
"""

from __future__ import annotations

import io
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.rag.readers.section import Read, Section, Unreadable, check_size

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 50_000_000
MAX_PIXELS = 50_000_000  # of one page, before it is unpacked
MAX_PAGES = 100  # of a TIFF file
MIN_SIDE = 16  # pixels; smaller pictures hold no text

_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")
_LONG_SIDE = 2000  # pixels; larger pictures are made smaller first


def picture(content: bytes, stem: str) -> Read:
    """Read a picture: a section for each page, numbered if there are several."""
    check_size(content, MAX_BYTES)
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its size, which is checked here, and of broken metadata
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
            if pages > MAX_PAGES:
                raise Unreadable(f"{pages} pages, more than {MAX_PAGES}")
            texts = []
            for page in range(pages):
                if page:
                    image.seek(page)
                texts.append(text_in(image))
    return stem, [Section((stem,), text, page if pages > 1 else None) for page, text in enumerate(texts, 1)]


def text_in(image: Image) -> str:
    """Return the lines of text in a picture, in the order of reading; `Unreadable` if it has too many pixels."""
    import numpy as np
    from PIL import Image as images
    from PIL import ImageOps

    if image.width * image.height > MAX_PIXELS:
        raise Unreadable(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    if min(image.size) < MIN_SIDE:
        return ""
    image.load()
    upright = (ImageOps.exif_transpose(image) or image).convert("RGBA")
    upright.thumbnail((_LONG_SIDE, _LONG_SIDE))
    if min(upright.size) < MIN_SIDE:
        return ""
    paper = images.alpha_composite(images.new("RGBA", upright.size, "white"), upright).convert("RGB")
    found = _engine()(np.asarray(paper)[:, :, ::-1])
    if found.boxes is None or not found.txts:
        return ""
    return _in_reading_order([(float(box[:, 0].min()), float(box[:, 1].min()), float(box[:, 1].max()), text)
                              for box, text in zip(found.boxes, found.txts, strict=True)])  # fmt: skip


def _in_reading_order(boxes: list[tuple[float, float, float, str]]) -> str:
    """Join pieces (left, top, bottom, text): those whose middles are within half a height of each other are one line."""
    lines: list[list[tuple[float, float, float, str]]] = []
    for box in sorted(boxes, key=lambda b: b[1] + b[2]):
        _, top, bottom, _ = lines[-1][0] if lines else box
        if lines and abs((box[1] + box[2]) - (top + bottom)) / 2 < (bottom - top) / 2:
            lines[-1].append(box)
        else:
            lines.append([box])
    return "\n".join(" ".join(text.strip() for *_, text in sorted(line)) for line in lines)


@lru_cache(maxsize=1)
def _engine() -> Any:
    import rapidocr

    models = Path(rapidocr.__file__).parent / "models"
    paths = {"Det": "PP-OCRv6_det_small.onnx", "Rec": "PP-OCRv6_rec_small.onnx", "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx"}
    files = {f"{step}.model_path": str(models / name) for step, name in paths.items()}
    return rapidocr.RapidOCR(params={"Global.log_level": "critical", **files})
