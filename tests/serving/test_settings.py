from __future__ import annotations

import pytest

from pipelines.config import CONFIGS
from pipelines.errors import ConfigError, UnknownName
from serving.settings import load_serve_config

FILES = sorted(path.stem for path in (CONFIGS / "serve").glob("*.yaml"))


def test_every_file_fits() -> None:
    assert FILES == ["default"]
    for name in FILES:
        config = load_serve_config(name)
        assert config.host == "127.0.0.1", "a file that listens on all addresses would be open to everybody"


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("port=70000", "port"),
        ("port=8081", "both 8081"),
        ("default_max_tokens=5000", "more than max_tokens"),
        ("slots.llamacpp=0", "slots.llamacpp"),
        ("slots.ollama=1", "unknown key"),
        ("port='8000'", "port"),
        ("restart.max_delay_seconds=null", "restart.max_delay_seconds"),
    ],
)
def test_wrong_values_are_named(override: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        load_serve_config("default", [override])


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_serve_config("default", ["port=-1", "colour=red", "max_k=99"])
    assert all(word in str(caught.value) for word in ("port", "colour", "max_k"))


def test_unknown_file() -> None:
    with pytest.raises(UnknownName, match="defualt"):
        load_serve_config("defualt")
