"""A file of rows from a data hub, at a fixed revision: `llmlab data fetch OWNER/NAME`, or `--data hub:OWNER/NAME`.

One file of rows (pipelines.tune.files) is fetched, and no code. It is kept by the commit it came from, so a file of a commit
that was fetched once needs no network again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.config import ROOT
from pipelines.errors import ConfigError, DataError
from pipelines.runs import disk_trouble_is_explained
from pipelines.tune.files import SUFFIXES
from pipelines.weights import hub_is_reachable

PREFIX = "hub:"
COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?P<file>(/\w[\w.=+-]*)*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
FORM = "OWNER/NAME, OWNER/NAME/path/of/file.parquet, either with @REVISION behind it"
SHOWN_FILES = 8


def data_cache() -> Path:
    """Return the folder of fetched files: `LLMLAB_DATA_CACHE`, or `.cache/data` in the repository."""
    return Path(os.environ.get("LLMLAB_DATA_CACHE") or ROOT / ".cache" / "data")


def fetch(name: str, say: Callable[[str], None]) -> Path:
    """Return a file of rows of a data set on the hub, fetching it unless it is here.

    Args:
        name: `OWNER/NAME[/FILE][@REVISION]`, with or without "hub:" before it; without FILE the set must have one only.
        say: receives one line before a download starts.

    Raises:
        ConfigError: the name has another form, or the set has no such file, or several.
        DataError: the hub cannot be reached, or has no such set or revision, or does not let this user have it.
    """
    matched = NAME.fullmatch(name.removeprefix(PREFIX))
    if not matched:
        raise ConfigError(f"{name} does not name a data set", FORM, "llmlab data fetch --help")
    repository, file, revision = matched["repository"], matched["file"].lstrip("/"), matched["revision"]
    kept = data_cache() / repository / (revision or "") / file
    if file and revision and COMMIT.fullmatch(revision) and kept.is_file():
        return kept
    reachable, reason = hub_is_reachable()
    if not reachable:
        raise DataError(f"{repository} is to be fetched, and the hub cannot be reached ({reason})", "a reachable hub",
                        "HF_ENDPOINT=... for another hub; or fetch the file elsewhere and name it with --data FILE")  # fmt: skip
    with disk_trouble_is_explained(data_cache()):
        return _download(repository, file, revision, say)


def _download(repository: str, file: str, revision: str | None, say: Callable[[str], None]) -> Path:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        info = HfApi(endpoint=endpoint).dataset_info(repository, revision=revision, files_metadata=True)
        sizes = {s.rfilename: s.size for s in info.siblings or () if s.rfilename.endswith(SUFFIXES)}
        chosen = _chosen(repository, file, sizes)
        target = data_cache() / repository / str(info.sha)
        if not (target / chosen).is_file():
            say(f"fetching {chosen} of {repository} at {str(info.sha)[:8]}: {(sizes[chosen] or 0) / 1e6:.1f} MB")
        return Path(hf_hub_download(repository, chosen, repo_type="dataset", revision=info.sha, local_dir=target,
                                    endpoint=endpoint))  # fmt: skip
    except GatedRepoError:
        raise DataError(f"{repository} is gated", "a token of a user who accepted its terms", "HF_TOKEN=...") from None
    except RepositoryNotFoundError:
        raise DataError(
            f"the hub has no data set {repository}, or not for this user", FORM, "HF_TOKEN=... if it is private"
        ) from None
    except RevisionNotFoundError:
        raise DataError(f"{repository} has no revision {revision}", "a branch, tag or commit", f"{PREFIX}{repository}") from None
    except HfHubHTTPError as error:
        raise DataError(f"the hub answered: {error}".splitlines()[0], "a file of rows", "the same command again") from None


def _chosen(repository: str, file: str, sizes: dict[str, Any]) -> str:
    """Return the file that is meant."""
    if file in sizes:
        return file
    if not file and len(sizes) == 1:
        return next(iter(sizes))
    names = sorted(sizes)
    shown = ", ".join(names[:SHOWN_FILES]) + (f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else "")
    came = f"{repository} has no file {file}" if file else f"{repository} has {len(names)} files of rows"
    raise ConfigError(came, f"one of {shown or '(none)'}", f"{PREFIX}{repository}/{names[0] if names else 'FILE'}")
