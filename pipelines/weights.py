"""Where a model's weights are, and how they get there: a package, a local folder, or the hub at a pinned revision.

Only safetensors and GGUF are read; nothing is unpickled and no code of a repository is run. Nothing is fetched unless
`obtain` is called with `pull=True`, and then the size is told first. Another model is never put in place of the one asked for.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.catalogue import HubFiles, Model, Weights
from pipelines.config import ROOT
from pipelines.errors import DiskFull, WeightsMissing
from pipelines.runs import disk_trouble_is_explained

SAFE_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
HUB_PROBE_SECONDS = 5.0


def model_cache() -> Path:
    """Return the folder of converted and downloaded weights: `LLMLAB_MODELS`, or `.cache/models` in the repository."""
    return Path(os.environ.get("LLMLAB_MODELS") or ROOT / ".cache" / "models")


def packaged_gguf(model: Model) -> Path | None:
    """Return the GGUF file that an installed package ships for this model, or None."""
    weights = _weights(model)
    if not (weights.package and weights.package_file):
        return None
    spec = importlib.util.find_spec(weights.package)  # found, not imported: the package's own imports do not matter here
    places = spec.submodule_search_locations if spec else None
    path = Path(places[0]) / weights.package_file if places else None
    return path if path and path.is_file() else None


def on_disk(model: Model) -> Path | None:
    """Return the folder that holds the model's safetensors, config and tokenizer, or None if it is not complete.

    Files that a user placed in `LLMLAB_MODELS/<name>` come first, then what was converted or fetched.
    """
    return placed(model.name) or whole(_folder(model))


def placed(name: str) -> Path | None:
    """Return the folder of the files that a user placed under a name in the cache of models, or None if one is missing."""
    folder = model_cache() / name
    both = (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
    return folder if both and list(folder.glob("*.safetensors")) else None


def whole(folder: Path) -> Path | None:
    """Return a folder of what was converted or fetched, or None if that is not complete."""
    return folder if (folder / "complete").is_file() else None


def is_here(model: Model) -> bool:
    """Return True if nothing has to be fetched to load the model."""
    return on_disk(model) is not None or packaged_gguf(model) is not None


def hf_directory(model: Model) -> Path:
    """Return the folder for `from_pretrained`, converting the packaged GGUF on first use.

    Raises:
        WeightsMissing: the weights are neither in a package nor on disk.
    """
    ready = on_disk(model)
    if ready:
        return ready
    packaged = packaged_gguf(model)
    if packaged is None:
        raise missing(model)
    return _convert(packaged, _folder(model))


def obtain(model: Model, *, pull: bool, say: Callable[[str], object]) -> Path:
    """Return the folder for `from_pretrained`, fetching the pinned revision if allowed; a download can be resumed.

    Args:
        model: a runnable catalogue entry.
        pull: False forbids any access to the hub.
        say: receives one line before a download starts.

    Raises:
        WeightsMissing: not on disk, and not allowed or not possible to fetch.
        DiskFull: the download would not fit.
    """
    try:
        return hf_directory(model)
    except WeightsMissing:
        if not pull:
            raise
    weights = _weights(model)
    reachable, reason = hub_is_reachable()
    if not reachable:
        raise missing(model, f"the hub cannot be reached ({reason})")
    revision = weights.revision or _newest(weights.hub, say)
    return fetch(HubFiles(hub=weights.hub, revision=revision, download_bytes=weights.size_bytes), _folder(model), say)


def fetch(source: HubFiles, folder: Path, say: Callable[[str], object]) -> Path:
    """Return a folder with the safe files of a pinned revision, after a download that a second call resumes.

    Args:
        source: what is fetched.
        folder: that gets the files.
        say: receives one line before the download starts.

    Raises:
        WeightsMissing: the download stopped.
        DiskFull: it does not fit.
    """
    from huggingface_hub import snapshot_download

    free = shutil.disk_usage(_existing(folder)).free
    here = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if free < source.download_bytes - here:
        raise DiskFull(f"{source.hub} needs {_gb(source)}, {free / 1e9:.1f} GB are free",
                       "room for the download", "free disk space, or set LLMLAB_MODELS to another disk")  # fmt: skip
    say(f"fetching {source.hub} at {source.revision[:8]}: {_gb(source)}; Ctrl-C is safe, a second start resumes")
    with disk_trouble_is_explained(folder):
        try:
            snapshot_download(source.hub, revision=source.revision, local_dir=folder, allow_patterns=SAFE_FILES,
                              ignore_patterns=["consolidated*"])  # fmt: skip
        except Exception as error:  # the errors of the hub client and of its HTTP library have no base in common
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            came = f"the download of {source.hub} stopped: {type(error).__name__}: {error}".splitlines()[0]
            expected = "a reachable hub; HF_TOKEN for a gated model"
            raise WeightsMissing(came, expected, "the same command again resumes") from None
    if not list(folder.glob("*.safetensors")):
        raise WeightsMissing(f"{source.hub} holds no safetensors, and nothing else is read", "a model in that form",
                             "convert it elsewhere, and place its files in LLMLAB_MODELS/NAME")  # fmt: skip
    (folder / "complete").write_text(f"every file of {source.hub} at {source.revision} was written\n", encoding="utf-8")
    return folder


def _newest(hub: str, say: Callable[[str], object]) -> str:
    """Return the newest commit of a repository that the catalogue does not pin; the user is told."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        commit = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(hub).sha
    except HfHubHTTPError as error:
        raise WeightsMissing(f"{hub} cannot be looked up: {type(error).__name__}", "a reachable hub; HF_TOKEN for a gated model",
                             "the same command again") from None  # fmt: skip
    say(f"the catalogue pins no revision of {hub}: its newest is taken, {commit}, and nobody has tried that one")
    return str(commit)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers' bars for each tensor off the screen; ours say what matters."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def hub_is_reachable() -> tuple[bool, str]:
    """Ask the hub for an answer within a few seconds; return (reachable, reason)."""
    import httpx

    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False, "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        status = httpx.head(endpoint, timeout=HUB_PROBE_SECONDS, follow_redirects=True).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return False, type(error).__name__
    return status < 500, f"HTTP {status}"


def missing(model: Model, why: str = "") -> WeightsMissing:
    """Build the error for weights that are not to be had: what is missing, its size and licence, and the way on."""
    weights = _weights(model)
    came = f"the weights of {model.name} are not on this machine" + (f", and {why}" if why else "")
    size = f"{described(weights)}, licence gate: {weights.license_gate}"
    way_on = f"with a reachable hub: llmlab pull {model.name}; or place its files in {model_cache() / model.name}"
    return WeightsMissing(came, size, way_on)


def described(source: HubFiles | Weights) -> str:
    """Return which files of a hub are meant, and their size."""
    pinned = f"revision {source.revision[:8]}" if source.revision else "its newest revision"
    return f"{source.hub} at {pinned}, {_gb(source)}"


def _weights(model: Model) -> Weights:
    if model.weights is None:
        raise WeightsMissing(f"the catalogue does not say where the weights of {model.name} are", "", f"llmlab show {model.name}")
    return model.weights


def _folder(model: Model) -> Path:
    packaged = packaged_gguf(model)
    source = f"gguf-{packaged.stat().st_size:x}-{_head_hash(packaged)}" if packaged else (
        _weights(model).revision or "newest")[:12]  # fmt: skip
    return model_cache() / model.name / source


def _head_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.sha256(stream.read(1 << 20)).hexdigest()[:12]


def _convert(gguf: Path, folder: Path) -> Path:
    """Dequantise a GGUF file into plain float32 safetensors with its tokenizer; atomic."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    with disk_trouble_is_explained(folder), _removed_on_failure(temporary):
        temporary.mkdir(parents=True, exist_ok=True)
        with quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
            model.config.name_or_path = ""
            model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)
        return _publish(temporary, folder)


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _publish(temporary: Path, folder: Path) -> Path:
    (temporary / "complete").write_text("every file below this folder was written\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(temporary)
    else:
        temporary.rename(folder)
    return folder


def _gb(source: HubFiles | Weights) -> str:
    size = source.size_bytes if isinstance(source, Weights) else source.download_bytes
    return f"{size / 1e9:.1f} GB"


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
