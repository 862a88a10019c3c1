"""A data set from a hub: the real client against a server on loopback that answers as the hub does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.config import ROOT
from tests.hub_server import COMMIT, Hub, running

ROWS = "".join(json.dumps({"prompt": f"What is {n} plus {n}?", "completion": f"{2 * n}"}) + "\n" for n in range(6)).encode()
FILES = {"team/one": {"data/train.jsonl": ROWS, "README.md": b"# One", "load.py": b"raise SystemExit(1)"},
         "team/two": {"train.jsonl": ROWS, "test.jsonl": ROWS}}  # fmt: skip


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running(FILES, {}) as hub:
        yield hub


def llmlab(hub: Hub | None, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return started(hub, cache, "-m", "labs", *arguments)


def started(hub: Hub | None, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"} if hub else {"HF_HUB_OFFLINE": "1"}
    own |= {"LLMLAB_DATA_CACHE": str(cache), "LLMLAB_RUNS": str(cache / "runs")}
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()} | own
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_one_file_of_rows_is_fetched_once_and_no_code(hub: Hub, tmp_path: Path) -> None:
    done = llmlab(hub, tmp_path, "data", "fetch", "team/one")
    assert done.returncode == 0, done.stderr
    file = Path(done.stdout.strip())
    assert file.read_bytes() == ROWS and COMMIT in str(file)
    assert f"fetching data/train.jsonl of team/one at {COMMIT[:8]}" in done.stderr
    assert not any("load.py" in path for path in hub.asked)
    offline = llmlab(None, tmp_path, "data", "fetch", f"hub:team/one/data/train.jsonl@{COMMIT}")
    assert Path(offline.stdout.strip()) == file, offline.stderr


@pytest.mark.slow
def test_a_set_of_the_hub_is_learnt(hub: Hub, tmp_path: Path) -> None:
    done = llmlab(hub, tmp_path, "finetune", "--rehearse", "--recipe", "lora-quick", "--data", "hub:team/one", "--epochs", "1",
                  "--set", "lora.rank=2", "--metrics-port", "none")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6 rows in" in done.stderr


REFUSED = {
    "team/two": "team/two has 2 files of rows",
    "team/one/data/test.jsonl": "has no file data/test.jsonl",
    "team/three": "the hub has no data set team/three",
    "team/gated": "team/gated is gated",
    "team/one@v9": "has no revision v9",
    "one": "does not name a data set",
    "team/../../etc/passwd": "does not name a data set",
}
ASK_FOR_ALL = """
import sys
from pipelines.errors import LabError
from pipelines.tune.hub import fetch
for name in sys.argv[1:]:
    try:
        print("fetched", fetch(name, print))
    except LabError as error:
        print(error.came)
"""


def test_what_cannot_be_fetched_is_explained(hub: Hub, tmp_path: Path) -> None:
    """In one process of its own: the client reads at import whether it may use the network."""
    done = started(hub, tmp_path, "-c", ASK_FOR_ALL, *REFUSED)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(REFUSED)
    for line, message in zip(said, REFUSED.values(), strict=True):
        assert message in line


def test_offline_it_says_so(tmp_path: Path) -> None:
    done = llmlab(None, tmp_path, "data", "fetch", "team/one")
    assert done.returncode == 1 and "the hub cannot be reached (HF_HUB_OFFLINE is set)" in done.stderr
    assert "Traceback" not in done.stderr
