"""infra/k8s, held against the schemas of KubeRay and of Kubernetes, and against the rest of the project."""

from __future__ import annotations

import functools
import gzip
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "infra" / "k8s"
KUBERNETES = "1.36"
FILES = sorted(FOLDER.rglob("*.yaml"))


def documents(file: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(file.read_text()) if document]


EVERY = [
    pytest.param(document, id=f"{file.relative_to(FOLDER)}: {document['kind']}")
    for file in FILES
    if file.name != "kustomization.yaml"
    for document in documents(file)
]


@functools.cache
def kuberay(kind: str) -> dict[str, Any]:
    """The operator's schema, tests/reference/README.md."""
    content = gzip.decompress((ROOT / f"tests/reference/kuberay/{kind}.v1.schema.json.gz").read_bytes())
    schema: dict[str, Any] = json.loads(content)
    return schema


def unknown(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Fields that the schema does not name: the API server would drop them without a word."""
    if isinstance(value, list):
        for index, one in enumerate(value):
            yield from unknown(one, schema.get("items", {}), f"{path}[{index}]")
    if not isinstance(value, dict) or "properties" not in schema:
        return
    for key, one in value.items():
        if key not in schema["properties"]:
            yield f"{path}.{key}"
        yield from unknown(one, schema["properties"].get(key, {}), f"{path}.{key}")


def check(document: dict[str, Any]) -> None:
    if document["apiVersion"] == "ray.io/v1":
        schema = kuberay(document["kind"])
        bare = {**document, "metadata": {}}  # the operator's schema leaves metadata to Kubernetes
        jsonschema.validate(bare, schema)
        assert not list(unknown(bare, schema))
        for pod in pods(document):
            kubernetes_validate.validate(
                {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod},
                KUBERNETES,
                strict=True,
            )
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def pods(document: Any) -> list[dict[str, Any]]:
    """Every pod specification inside a document."""
    if isinstance(document, list):
        return [pod for one in document for pod in pods(one)]
    if not isinstance(document, dict):
        return []
    return [document] if "containers" in document else [pod for one in document.values() for pod in pods(one)]


@pytest.mark.parametrize("document", EVERY)
def test_each_document_is_what_its_schema_says(document: dict[str, Any]) -> None:
    check(document)


@pytest.mark.parametrize("slip", ["workerGroupSpec", "type", "container", "probe"])
def test_a_slip_is_seen(slip: str) -> None:
    (cluster,) = documents(FOLDER / "raycluster.yaml")
    spec = cluster["spec"]
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    if slip == "workerGroupSpec":
        spec["workerGroupSpec"] = spec.pop("workerGroupSpecs")
    elif slip == "type":
        spec["workerGroupSpecs"][0]["maxReplicas"] = "eight"
    elif slip == "container":
        head["imagePullPolicies"] = "Always"
    else:
        head["livenessProbe"] = {"httpGet": {"path": "/"}}  # of no port
    with pytest.raises((AssertionError, jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(cluster)


@pytest.mark.parametrize("document", [one for one in EVERY if pods(one.values[0])])
def test_pods_pass_the_restricted_standard(document: dict[str, Any]) -> None:
    """What the label of namespace.yaml enforces, and a limit of memory for everyone."""
    for pod in pods(document):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert all(
            {"emptyDir", "persistentVolumeClaim", "secret", "configMap"} & set(v)
            for v in pod.get("volumes", [])
        )
        for container in pod["containers"]:
            allowed = container["securityContext"]
            assert allowed["allowPrivilegeEscalation"] is False
            assert allowed["capabilities"]["drop"] == ["ALL"]
            assert container["resources"]["limits"]["memory"]


def test_no_secret_is_in_the_files() -> None:
    for file in FILES:
        for document in documents(file):
            assert document["kind"] != "Secret"
            for pod in pods(document):
                for env in (env for container in pod["containers"] for env in container.get("env", [])):
                    if re.search("PASSWORD|SECRET|KEY|TOKEN", env["name"]):
                        assert "valueFrom" in env, env["name"]


def test_every_file_of_the_folder_is_named_by_the_kustomization() -> None:
    (listed,) = documents(FOLDER / "kustomization.yaml")
    apart = {"kustomization.yaml", "serve.yaml"}
    assert {*listed["resources"]} == {file.name for file in FOLDER.glob("*.yaml")} - apart
    assert all((FOLDER / name).is_file() for name in listed["resources"])


def test_what_the_policies_let_in_are_ports_that_somebody_listens_on() -> None:
    """Of the pods that the files make; 8000 is the endpoint's."""
    listening = {8000}
    for file in FILES:
        for document in documents(file):
            for pod in pods(document):
                ports = [port for container in pod["containers"] for port in container.get("ports", [])]
                listening |= {port["containerPort"] for port in ports}
    for document in documents(FOLDER / "network.yaml"):
        for rule in document["spec"].get("ingress", []):
            assert {port["port"] for port in rule.get("ports", [])} <= listening


def test_the_cluster_is_the_one_of_ray_cluster_yaml() -> None:
    (here,) = documents(FOLDER / "raycluster.yaml")
    there = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["available_node_types"]
    groups = {group["labels"]["hrnet-pool"]: group for group in here["spec"]["workerGroupSpecs"]}
    assert groups.keys() == there.keys() - {"head"}
    for name, group in groups.items():
        assert (group["minReplicas"], group["maxReplicas"]) == (
            there[name]["min_workers"],
            there[name]["max_workers"],
        )
    assert here["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    from importlib.metadata import version

    assert here["spec"]["rayVersion"] == version("ray")


@pytest.mark.parametrize("file", sorted((FOLDER / "jobs").glob("*.yaml")), ids=lambda file: file.stem)
def test_each_job_is_a_command_that_the_project_has(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.cli import main

    (job,) = documents(file)
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (program, arguments[0]) == ("hrnet", file.stem)
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    known = capsys.readouterr().out
    for flag in (argument for argument in arguments if argument.startswith("--")):
        assert flag in known


def test_the_endpoint_is_what_serve_and_the_application_take() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.settings import LiveSettings, ServeArgs

    service, _ = documents(FOLDER / "serve.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == "serve.app:build"
    args = ServeArgs.model_validate(application.args)
    assert args.need_keys
    (mount,) = [
        mount
        for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]
        if mount["name"] == "keys"
    ]
    assert str(args.keys) == f"{mount['mountPath']}/keys"
    (deployment,) = application.deployments
    assert LiveSettings.model_validate(deployment.user_config).sha256
    assert config.http_options.port in {
        port["containerPort"]
        for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        for port in group["template"]["spec"]["containers"][0]["ports"]
    }
