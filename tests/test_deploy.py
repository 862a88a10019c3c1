"""configs/deploy: the manifests fit Kubernetes' schemas and the configuration, and the Dockerfile fits the project."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring.metrics import series_names
from pipelines import catalogue
from pipelines.architecture import cache_of, config_of
from pipelines.config import ROOT
from pipelines.plan import RUNTIME_BYTES
from serving.engines.llamacpp import PROMPT_CACHE_MIB
from serving.settings import ServeConfig, load_serve_config

DEPLOY = ROOT / "configs" / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
VERSIONS = ("1.30", "1.37")  # the oldest with a preStop sleep, and the newest with a schema here
CACHE_BYTES_PER_VALUE = 2  # llama.cpp's KV cache is in 16 bits


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))
    return content


KUSTOMIZATION, DEPLOYMENT, AUTOSCALER = read("kustomization.yaml"), read("deployment.yaml"), read("autoscaler.yaml")
POD = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]


@pytest.fixture
def config() -> ServeConfig:
    overrides = [word for flag, word in zip(CONTAINER["args"], CONTAINER["args"][1:], strict=False) if flag == "--set"]
    return load_serve_config("default", overrides)


def bytes_of(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 2**20, "Gi": 2**30}[unit]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", KUSTOMIZATION["resources"])
def test_manifests_fit_the_schemas(name: str, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    validate(read(name), version, strict=True)


def test_every_manifest_is_applied_and_named_once() -> None:
    beside = {"kustomization.yaml", "prometheus-adapter.yaml"}
    assert {path.name for path in DEPLOY.glob("*.yaml")} - beside == set(KUSTOMIZATION["resources"])
    assert KUSTOMIZATION["images"][0]["name"] == CONTAINER["image"]
    assert KUSTOMIZATION["namespace"] == read("namespace.yaml")["metadata"]["name"]


def test_kustomize_joins_them(tmp_path: Path) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY)], capture_output=True, text=True, check=True, env={"HOME": str(tmp_path)}
    )
    made = {item["kind"]: item for item in yaml.safe_load_all(done.stdout)}
    assert len(made) == len(KUSTOMIZATION["resources"])
    labels = made["Deployment"]["spec"]["template"]["metadata"]["labels"]
    matching = [made[kind]["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")]
    for selector in (*matching, made["Service"]["spec"]["selector"], made["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]):
        assert selector and selector.items() <= labels.items()
    assert made["Deployment"]["spec"]["template"]["spec"]["containers"][0]["image"] == "llmlab:0.1.0"


def test_a_slow_load_is_not_killed_and_a_dead_gateway_is(config: ServeConfig) -> None:
    startup, ready, alive = (CONTAINER[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness"))
    assert startup["failureThreshold"] * startup["periodSeconds"] >= config.startup_seconds
    assert (startup["httpGet"]["path"], ready["httpGet"]["path"], alive["httpGet"]["path"]) == ("/healthz", "/readyz", "/healthz")
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == config.port and config.host == "0.0.0.0"
    assert {probe["httpGet"]["port"] for probe in (startup, ready, alive)} == {port["name"]}


def test_the_paths_of_probes_are_the_gateways() -> None:
    gateway = (ROOT / "serving" / "gateway.py").read_text(encoding="utf-8")
    assert all(f'"{CONTAINER[f"{kind}Probe"]["httpGet"]["path"]}"' in gateway for kind in ("startup", "readiness", "liveness"))


def test_what_is_in_flight_may_end(config: ServeConfig) -> None:
    pause = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] >= pause + config.drain_seconds + 10  # the engine's end


def test_memory_is_that_of_the_catalogue(config: ServeConfig) -> None:
    """Weights, the KV cache of all slots, llama.cpp's cache of prompts, and a runtime each for gateway and engine."""
    model = catalogue.runnable(CONTAINER["args"][1])
    assert model.weights
    cache = cache_of(config_of(model)).bytes(config.context_tokens, CACHE_BYTES_PER_VALUE) * config.slots.llamacpp
    needed = model.weights.size_bytes + cache + PROMPT_CACHE_MIB * 2**20 + RUNTIME_BYTES
    resources = CONTAINER["resources"]
    assert needed <= bytes_of(resources["requests"]["memory"]) <= bytes_of(resources["limits"]["memory"]) < 3 * needed


def test_nothing_runs_with_privileges() -> None:
    pod, container = POD["securityContext"], CONTAINER["securityContext"]
    assert pod["runAsNonRoot"] and pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}  # fmt: skip
    assert POD["automountServiceAccountToken"] is False
    assert read("network.yaml")["spec"]["policyTypes"] == ["Ingress", "Egress"]


def test_secrets_are_only_referred_to() -> None:
    plain = {entry["name"]: entry["value"] for entry in CONTAINER["env"] if "value" in entry}
    secret = {name: value for name, value in plain.items() if re.search("KEY|TOKEN|PASSWORD|SECRET", name)}
    mounts = {mount["name"]: mount for mount in CONTAINER["volumeMounts"]}
    assert all(value.startswith(mounts["keys"]["mountPath"] + "/") for value in secret.values())  # a file, not what it holds
    assert "secret" in next(volume for volume in POD["volumes"] if volume["name"] == "keys") and mounts["keys"]["readOnly"]
    assert "Secret" not in {read(name)["kind"] for name in KUSTOMIZATION["resources"]}


def test_every_path_that_is_written_is_a_volume() -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in POD["volumes"]}
    values = [entry["value"] for entry in CONTAINER["env"] if "value" in entry]
    assert "/app/.cache" in mounts and all(any(value.startswith(path) for path in mounts) for value in values)


def test_replicas_follow_a_metric_that_exists(config: ServeConfig) -> None:
    spec = AUTOSCALER["spec"]
    pods = spec["metrics"][0]["pods"]
    metric = pods["metric"]["name"]
    assert metric in series_names()
    assert 1 <= int(pods["target"]["averageValue"]) < config.slots.llamacpp  # fewer than wait before anybody is refused
    (rule,) = read("prometheus-adapter.yaml")["rules"]["custom"]
    assert rule["name"]["as"] == metric and rule["seriesQuery"].startswith(metric + "{")
    assert spec["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"] and "replicas" not in DEPLOYMENT["spec"]
    assert spec["minReplicas"] > read("disruption.yaml")["spec"]["maxUnavailable"]
    assert read("storage.yaml")["spec"]["accessModes"] == ["ReadWriteMany"] and spec["maxReplicas"] > 1


def test_the_image_copies_what_there_is_and_runs_the_command_line() -> None:
    copied = [words for line in DOCKERFILE.splitlines() if line.startswith("COPY ") and "--from" not in line
              for words in shlex.split(line)[1:-1]]  # fmt: skip
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in copied:
        assert (ROOT / name).exists() and name.split("/")[0] in kept, name
        assert any(path == name or path.startswith(name) for path in tracked), name
    assert re.search(r"^ENTRYPOINT \[\"llmlab\"\]$", DOCKERFILE, re.M) and "USER 10001:10001" in DOCKERFILE
    command = shlex.split(re.search(r"^CMD \[(.+)\]$", DOCKERFILE, re.M)[1].replace(",", " "))  # type: ignore[index]
    assert command == CONTAINER["args"]
    done = subprocess.run([sys.executable, "-m", "labs", *command[:2], "--help"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0


def test_the_dockerfile_is_linted() -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if not hadolint:
        pytest.skip("hadolint is not installed (requirements/dev.lock)")
    done = subprocess.run([hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
