"""The texts that labs learn from, against Python's own reader of translations."""

from __future__ import annotations

import gettext
import gzip
import json
from pathlib import Path

import pytest

from labs.frame import texts
from pipelines.errors import DataError


def test_translations_are_those_that_gettext_reads() -> None:
    languages = texts.translated_languages()[:3]
    if not languages:
        pytest.skip("there are no translations of coreutils below /usr/share/locale")
    found = texts.translations(languages)
    assert list(found) == ["en", *languages] and len(found["en"]) > 300
    for language in languages:
        with (texts.LOCALES / language / texts.CATALOGUE).open("rb") as stream:
            oracle = gettext.GNUTranslations(stream)
        assert found[language] == [oracle.gettext(text) for text in found["en"]]


def test_the_manual_and_the_library_are_real_text() -> None:
    assert sum(map(len, texts.manual())) > 300_000
    modules = texts.library(50_000)
    assert 50_000 <= sum(map(len, modules)) and all("import" in text or "def " in text for text in modules)
    assert modules == texts.library(50_000)


def test_preferences_are_the_last_question_and_two_replies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMLAB_DATA", str(tmp_path))
    with pytest.raises(DataError, match="is absent"):
        texts.preferences()
    before = "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: How are you?\n\nAssistant: "
    rows = [{"chosen": before + "Well.", "rejected": before + "No."}, {"chosen": before + "Same", "rejected": before + "Same"}]
    with gzip.open(texts.preferences_file(), "wt") as stream:
        stream.write("\n".join(map(json.dumps, rows)))
    assert texts.preferences() == [("How are you?", "Well.", "No.")]
    texts.preferences_file().write_bytes(b"no gzip")
    with pytest.raises(DataError, match="not a file of preferences"):
        texts.preferences()
