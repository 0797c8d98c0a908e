"""deploy/: the manifests fit the Kubernetes API, the services and each other, and the images fit the tree.

Nothing here needs a cluster or a container engine, so nothing here shows that the manifests work in one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tinkerbell.v1 import sampler_pb2, trainer_pb2
from trainer_service import trainer as trainer_module

ROOT = Path(__file__).parents[2]
RPC_SERVICES = {
    "trainer": trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name,
    "sampler": sampler_pb2.DESCRIPTOR.services_by_name["SamplerService"].full_name,
}
both_services = pytest.mark.parametrize("name", RPC_SERVICES)


@pytest.fixture(scope="module")
def documents() -> dict[tuple[str, str], dict]:
    """Rendered manifests by (kind, name)."""
    if shutil.which("kubectl") is None:
        pytest.fail(
            "kubectl is not on PATH, and it renders deploy/base. Hosted CI runners mostly have it; elsewhere install "
            "1.27 or newer as https://kubernetes.io/docs/tasks/tools says. No cluster is needed."
        )
    command = ["kubectl", "kustomize", ROOT / "deploy/base"]
    rendered = subprocess.run(command, capture_output=True, text=True, check=False)
    assert rendered.returncode == 0, rendered.stderr
    return {
        (document["kind"], document["metadata"]["name"]): document for document in yaml.safe_load_all(rendered.stdout)
    }


@pytest.fixture
def workload(documents, name) -> dict:
    return documents["Deployment" if name == "trainer" else "StatefulSet", f"tinkerbell-{name}"]


@pytest.fixture
def pod(workload) -> dict:
    return workload["spec"]["template"]["spec"]


@pytest.fixture
def container(pod) -> dict:
    (container,) = pod["containers"]
    return container


def flags(container: dict, flag: str) -> list[str]:
    return [value for name, _, value in (argument.partition("=") for argument in container["args"]) if name == flag]


def flag(container: dict, name: str) -> str:
    (value,) = flags(container, name)
    return value


def listen_port(container: dict) -> int:
    host, _, port = flag(container, "--listen").rpartition(":")
    assert host == "0.0.0.0", "probes and other pods come from outside"
    return int(port)


def test_documents_fit_the_schema_of_the_newest_kubernetes(documents):
    assert len(documents) == 7
    for document in documents.values():
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@both_services
def test_probes_ask_over_grpc_for_what_the_service_answers(name, container):
    port = listen_port(container)
    assert container["startupProbe"]["grpc"] == {"port": port}
    assert container["livenessProbe"]["grpc"] == {"port": port}
    assert container["readinessProbe"]["grpc"] == {"port": port, "service": RPC_SERVICES[name]}


@both_services
def test_network_services_lead_to_the_listening_port(name, documents, workload, container):
    port = listen_port(container)
    assert {"name": "grpc", "containerPort": port} in container["ports"]
    labels = workload["spec"]["template"]["metadata"]["labels"]
    selected = [
        service["spec"]
        for (kind, _), service in documents.items()
        if kind == "Service" and service["spec"]["selector"].items() <= labels.items()
    ]
    assert len(selected) == {"trainer": 1, "sampler": 2}[name]
    for spec in selected:
        assert (spec["ports"][0]["port"], spec["ports"][0]["targetPort"]) == (port, "grpc")


def test_clients_may_reach_the_sampler_over_http(documents):
    (container,) = documents["StatefulSet", "tinkerbell-sampler"]["spec"]["template"]["spec"]["containers"]
    host, _, port = flag(container, "--http").rpartition(":")
    assert host == "0.0.0.0"
    assert {"name": "http", "containerPort": int(port)} in container["ports"]
    _, http = documents["Service", "tinkerbell-sampling"]["spec"]["ports"]
    assert (http["port"], http["targetPort"]) == (int(port), "http")
    _, clients = documents["NetworkPolicy", "tinkerbell"]["spec"]["ingress"]
    assert {"port": "http", "protocol": "TCP"} in clients["ports"]


def test_trainer_pushes_to_every_replica_of_the_sampler(documents):
    trainer = documents["Deployment", "tinkerbell-trainer"]["spec"]["template"]["spec"]["containers"][0]
    sampler = documents["StatefulSet", "tinkerbell-sampler"]["spec"]
    headless = documents["Service", sampler["serviceName"]]["spec"]
    assert headless["clusterIP"] == "None"
    assert headless["publishNotReadyAddresses"], "a replica gets its adapters before it is ready"
    port = listen_port(sampler["template"]["spec"]["containers"][0])
    assert flags(trainer, "--sampler") == [f"dns:{sampler['serviceName']}:{port}"]
    assert "--await-trainer" in sampler["template"]["spec"]["containers"][0]["args"], "ready means current"


def test_trainer_reaches_the_lanes_of_samplers_whatever_their_ports(documents):
    own, _ = documents["NetworkPolicy", "tinkerbell"]["spec"]["ingress"]
    (peer,) = own["from"]
    labels = documents["Deployment", "tinkerbell-trainer"]["spec"]["template"]["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"].items() <= labels.items()
    assert "ports" not in own


def test_checkpoints_outlive_the_pod(documents):
    pod = documents["Deployment", "tinkerbell-trainer"]["spec"]["template"]["spec"]
    folder = flag(pod["containers"][0], "--checkpoints")
    (volume,) = [mount["name"] for mount in pod["containers"][0]["volumeMounts"] if mount["mountPath"] == folder]
    (claim,) = [entry["persistentVolumeClaim"]["claimName"] for entry in pod["volumes"] if entry["name"] == volume]
    assert ("PersistentVolumeClaim", claim) in documents


@pytest.mark.parametrize("workload", [("Deployment", "tinkerbell-trainer"), ("StatefulSet", "tinkerbell-sampler")])
def test_prometheus_finds_the_metrics_and_may_reach_them(documents, workload):
    template = documents[workload]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    host, _, port = flag(container, "--metrics").rpartition(":")
    assert host == "0.0.0.0"
    assert template["metadata"]["annotations"] == {"prometheus.io/scrape": "true", "prometheus.io/port": port}
    assert {"name": "metrics", "containerPort": int(port)} in container["ports"]
    _, clients = documents["NetworkPolicy", "tinkerbell"]["spec"]["ingress"]
    assert {"port": "metrics", "protocol": "TCP"} in clients["ports"]


def test_there_is_never_a_second_trainer(documents):
    spec = documents["Deployment", "tinkerbell-trainer"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


@both_services
def test_the_model_that_is_made_is_the_model_that_is_served(name, pod, container):
    (init,) = pod["initContainers"]
    model = Path(flag(container, "--model"))
    assert init["command"] == ["python", "scripts/make_models.py", "smollm2", str(model)]
    assert init["image"] == container["image"]
    for each in (init, container):
        assert str(model.parent) in [mount["mountPath"] for mount in each["volumeMounts"]]


@both_services
def test_drain_ends_before_kubernetes_kills(name, pod, container):
    engine_shutdown = {"sampler": 15, "trainer": trainer_module._DRAIN_SECONDS}[
        name
    ]  # vLLM's own timeout for its processes
    assert pod["terminationGracePeriodSeconds"] > float(flag(container, "--drain-seconds")) + engine_shutdown


@both_services
def test_pods_have_no_more_rights_than_they_need(name, pod):
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    user = pod["securityContext"]["runAsUser"]
    assert f"USER {user}:{user}" in containerfile(name)
    for each in (*pod["initContainers"], *pod["containers"]):
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        writable = {mount["mountPath"] for mount in each["volumeMounts"] if not mount.get("readOnly")}
        assert writable >= {"/tmp", "/home/tinkerbell"}
        assert {"requests", "limits"} <= each["resources"].keys()


@both_services
def test_every_flag_is_one_that_the_service_has(name, container):
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", f"{name}_service", "--help"]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    known = set(re.findall(r"--[a-z][a-z0-9-]*", shown.stdout))
    used = {argument.partition("=")[0] for argument in container["args"]}
    assert used <= known


@both_services
def test_image_tag_is_the_version_of_the_project(name, container):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert container["image"] == f"tinkerbell-{name}:{version}"
    assert f"-t {container['image']} " in (ROOT / f"deploy/{name}.Containerfile").read_text()


def containerfile(name: str) -> str:
    """Without comments, and with one instruction a line."""
    text = (ROOT / f"deploy/{name}.Containerfile").read_text()
    return re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))


def instructions(name: str, keyword: str) -> list[str]:
    return re.findall(rf"^{keyword} (.*)$", containerfile(name), flags=re.MULTILINE)


@both_services
def test_image_copies_what_is_in_the_tree_and_in_the_build_context(name):
    sources = [source for copy in instructions(name, "COPY") for source in copy.split()[:-1]]
    assert f"{name}_service" in sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    context = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {source.partition("/")[0] for source in sources} <= context


@both_services
def test_image_is_pinned_unprivileged_and_gets_signals(name, container):
    (base,) = instructions(name, "FROM")
    assert re.fullmatch(r"python:3\.12\.\d+-slim-[a-z]+", base)
    assert instructions(name, "USER") == ["10001:10001"]
    assert [json.loads(entry) for entry in instructions(name, "ENTRYPOINT")] == [["python", "-m", f"{name}_service"]]
    assert instructions(name, "EXPOSE") == [str(listen_port(container))]


def test_yamllint_finds_nothing():
    yamllint = Path(sys.executable).with_name("yamllint")
    result = subprocess.run([yamllint, "--strict", "deploy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
