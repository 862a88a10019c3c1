from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import runs
from pipelines.errors import DataError, RunIncomplete, UnknownName

WRITER = """
import os, sys
from pathlib import Path
from pipelines import runs
limit, count = int(sys.argv[1]), 0
real = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}
def counted(name):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == limit:
            os._exit(9)
        return real[name](*args, **kwargs)
    return call
for name in real:
    setattr(os, name, counted(name))
with runs.draft("finetune", "killed", {"limit": 1}) as work:
    work.write_json("artefact.json", {"a": 1})
    work.append_jsonl("metrics.jsonl", {"loss": 1.0})
    (work.scratch).mkdir(exist_ok=True)
    (work.scratch / "state").write_text("x")
    print(work.finish({"loss": 1.0}).id)
"""


def make(model: str = "toy", **config: object) -> runs.Run:
    with runs.draft("finetune", model, config) as work:
        work.write_json("artefact.json", {"a": 1})
        (work.path / "folder").mkdir(exist_ok=True)
        (work.path / "folder" / "weights.bin").write_bytes(b"\0" * 64)
        return work.finish({"loss": 0.5})


def test_a_finished_run_is_read_back_with_its_facts() -> None:
    run = make("read-back", seed=1)
    assert runs.find(run.id).facts == {"loss": 0.5}
    assert set(run.json("manifest.json")["files"]) == {"artefact.json", "config.json", "environment.json", "folder/weights.bin"}
    assert run.json("environment.json")["packages"]["torch"].startswith("2.")


def test_a_passport_names_the_inputs() -> None:
    first = make("passport", seed=2)
    with runs.draft("evaluate", "passport", {"run": first.id}) as work:
        second = work.finish({}, inputs=(first,))
    assert second.inputs == ({"kind": "finetune", "id": first.id, "fingerprint": first.fingerprint},)


def test_a_run_killed_at_any_write_is_refused_and_then_finished(tmp_path: Path) -> None:
    environment = os.environ | {"LLMLAB_RUNS": str(tmp_path), "PYTHONPATH": os.getcwd()}

    def write(limit: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WRITER, str(limit)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    killed = 0
    while (status := write(killed + 1).returncode) == 9:
        killed += 1
        for path in tmp_path.glob("finetune/killed/*"):
            if path.name.startswith("."):
                if not (path / "manifest.json").exists():
                    with pytest.raises(RunIncomplete):
                        runs.read(path)
            else:  # the rename was reached: then it must be whole
                assert runs.read(path).facts == {"loss": 1.0}
    assert killed > 8 and status == 0
    finished = [p for p in tmp_path.glob("finetune/killed/*") if not p.name.startswith(".")]
    assert all(runs.read(p).facts == {"loss": 1.0} for p in finished) and finished


@pytest.mark.parametrize("damage", ["missing", "changed", "no manifest", "broken manifest", "edited manifest"])
def test_a_damaged_run_is_refused(damage: str) -> None:
    run = make("damaged", damage=damage)
    manifest = run.path / "manifest.json"
    if damage == "missing":
        (run.path / "folder" / "weights.bin").unlink()
    elif damage == "changed":
        (run.path / "folder" / "weights.bin").write_bytes(b"\1" * 64)
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "broken manifest":
        manifest.write_text(manifest.read_text()[:-20])
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"facts": {"loss": 0.0}}))
    with pytest.raises(RunIncomplete):
        runs.read(run.path)


def test_unknown_and_ambiguous_ids_are_explained() -> None:
    make("one", seed=5), make("two", seed=6)
    with pytest.raises(UnknownName, match="no run is"):
        runs.find("19700101")
    with pytest.raises(UnknownName, match="runs are"):
        runs.find("20")


def test_two_processes_do_not_make_the_same_run() -> None:
    with (
        runs.draft("finetune", "twice", {}),
        pytest.raises(DataError, match="another process"),
        runs.draft("finetune", "twice", {}),
    ):
        pass


def test_safetensors_on_a_full_disk_is_explained(tmp_path: Path) -> None:
    """A real full disk: a tiny tmpfs in a mount namespace of its own; the old file stays whole."""
    script = (
        "import sys, numpy\nfrom pathlib import Path\nfrom safetensors.numpy import save_file\n"
        "from pipelines.errors import DiskFull\nfrom pipelines.runs import disk_trouble_is_explained\n"
        "path = Path(sys.argv[1])\n"
        "try:\n    with disk_trouble_is_explained(path): save_file({'a': numpy.zeros(10**6)}, path / 'big.safetensors')\n"
        "except DiskFull as error: print(error)\n"
    )
    inner = f'mount -t tmpfs -o size=64k none {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    done = subprocess.run(["unshare", "-m", "sh", "-c", inner, script], capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this user may not mount a file system")
    assert "no space left" in done.stdout, done.stderr


def test_rehearsals_are_not_the_latest_run() -> None:
    with runs.draft("finetune", "rehearsed", {}, rehearsal=True) as work:
        work.finish({})
    assert runs.latest("finetune", "rehearsed") is None
    assert runs.latest("finetune", "rehearsed", rehearsal=True) is not None
