"""Real text that labs learn from: what every Python brings along, translations on this machine, preferences that a user may have.

The manual is English prose about a language; the library's source is a domain of its own. Both are read from the interpreter
that runs this, so they differ a little between its versions.
"""

from __future__ import annotations

import gzip
import json
import os
import struct
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from pipelines.config import ROOT
from pipelines.errors import DataError

PREFERENCES = "hh_rlhf_harmless_test.jsonl.gz"
LOCALES = Path("/usr/share/locale")
CATALOGUE = "LC_MESSAGES/coreutils.mo"
LANGUAGES = ("de", "fr", "es", "pt_BR", "pl", "ru", "uk", "tr", "vi", "zh_CN", "ja", "ko")
MO_MAGIC = 0x950412DE
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "


def manual() -> list[str]:
    """Return the topics of Python's own reference manual, about 465,000 characters, by name."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def library(characters: int) -> list[str]:
    """Return whole modules of Python's standard library, in the order of their names, about so many characters of them."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        if sum(map(len, found)) >= characters:
            break
        found.append(path.read_text(encoding="utf-8", errors="replace"))
    return found


def translated_languages() -> list[str]:
    """Return those of `LANGUAGES` into which the messages of GNU coreutils are translated on this machine."""
    return [language for language in LANGUAGES if (LOCALES / language / CATALOGUE).is_file()]


def translations(languages: Sequence[str]) -> dict[str, list[str]]:
    """Return the messages of GNU coreutils that every one of these languages has, in each and, as "en", as they were written."""
    read = {language: _messages(LOCALES / language / CATALOGUE) for language in languages}
    common = sorted(set.intersection(*(set(messages) for messages in read.values())))
    return {"en": common} | {language: [messages[text] for text in common] for language, messages in read.items()}


def _messages(path: Path) -> dict[str, str]:
    """Return original -> translation of a gettext catalogue, without plurals and without what is left as it is."""
    content = path.read_bytes()
    order = "<" if struct.unpack_from("<I", content)[0] == MO_MAGIC else ">"
    count, originals, translated = struct.unpack_from(f"{order}3I", content, 8)

    def text(table: int, number: int) -> str:
        length, start = struct.unpack_from(f"{order}2I", content, table + 8 * number)
        return content[start : start + length].decode("utf-8")

    pairs = ((text(originals, i), text(translated, i)) for i in range(count))
    return {one: other for one, other in pairs if one and "\0" not in one and one != other}


def preferences_file() -> Path:
    """Return where hh-rlhf's harmless test pairs are looked for: the folder in `LLMLAB_DATA`, or ../shared/data."""
    return Path(os.environ.get("LLMLAB_DATA") or ROOT.parent / "shared" / "data") / PREFERENCES


def preferences() -> list[tuple[str, str, str]]:
    """Return (last question, chosen reply, rejected reply) of every pair; earlier turns are left out.

    Raises:
        DataError: the file is absent or holds something else.
    """
    path = preferences_file()
    found = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                pair = json.loads(line)
                question, chosen = _split(pair["chosen"])
                rejected = _split(pair["rejected"])[1]
                if question and chosen and rejected and chosen != rejected:
                    found.append((question, chosen, rejected))
    except FileNotFoundError:
        raise DataError(f"{path.name} is absent", "Anthropic's hh-rlhf, harmless-base, test.jsonl.gz, in the folder named by "
                        "LLMLAB_DATA", "LLMLAB_DATA=folder llmlab lab run dpo-openchat") from None  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path.name} is not a file of preferences ({type(error).__name__})", "lines with chosen and rejected"
        ) from None
    return found


def _split(dialogue: str) -> tuple[str, str]:
    """Return the last question and the last reply of a dialogue."""
    before, _, reply = dialogue.rpartition(ASSISTANT)
    return before.rpartition(HUMAN)[2].strip(), reply.strip()
