"""KubeRay's manifests: valid by the operator's own schema, and of a kind that a restricted namespace lets in."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from composing import run_config

from rlsys.cluster.topology import DOMAIN_LABEL

FOLDER = Path(__file__).parents[2] / "launch" / "kuberay"
SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text(encoding="utf-8"))
COMPUTE_DOMAIN = {  # resource.nvidia.com/v1beta1, the fields that are used
    "type": "object",
    "required": ["numNodes", "channel"],
    "additionalProperties": False,
    "properties": {
        "numNodes": {"type": "integer", "minimum": 0},
        "channel": {
            "type": "object",
            "required": ["resourceClaimTemplate"],
            "additionalProperties": False,
            "properties": {
                "resourceClaimTemplate": {
                    "type": "object",
                    "required": ["name"],
                    "additionalProperties": False,
                    "properties": {"name": {"type": "string"}},
                }
            },
        },
    },
}


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def of_kind(name: str, kind: str) -> dict[str, Any]:
    (found,) = (each for each in manifests(name) if each["kind"] == kind)
    return found


def check(manifest: dict[str, Any]) -> None:
    schema = {"$defs": SCHEMA["$defs"], **SCHEMA["kinds"][manifest["kind"]]}
    jsonschema.Draft202012Validator(schema).validate(manifest)


def cluster(name: str) -> dict[str, Any]:
    if name == "rayjob.yaml":
        return of_kind(name, "RayJob")["spec"]["rayClusterSpec"]
    return of_kind(name, "RayCluster")["spec"]


def pods(name: str) -> Iterator[dict[str, Any]]:
    spec = cluster(name)
    yield spec["headGroupSpec"]["template"]["spec"]
    yield from (group["template"]["spec"] for group in spec["workerGroupSpecs"])


WITH_PODS = ["raycluster.yaml", "rayjob.yaml", "nvl72.yaml"]


@pytest.mark.parametrize(
    ("name", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob"), ("nvl72.yaml", "RayCluster")]
)
def test_manifests_are_valid_by_the_operators_schema(name: str, kind: str) -> None:
    check(of_kind(name, kind))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "headGroupSpec", "rayStartParam"), {}),
        (("spec", "workerGroupSpecs", 0, "replicas"), "2"),
        (("spec", "authOptions", "mode"), "password"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "imagePolicy"), "Always"),
    ],
)
def test_the_schema_refuses_what_the_operator_would(path: tuple[Any, ...], value: Any) -> None:
    manifest = of_kind("raycluster.yaml", "RayCluster")
    inside: Any = manifest
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


@pytest.mark.parametrize("name", WITH_PODS)
def test_pods_are_let_into_a_restricted_namespace(name: str) -> None:
    (namespace,) = manifests("namespace.yaml")
    assert namespace["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    # The operator makes one more pod for a job, of this template, or else of one that such a namespace refuses.
    submitters = [of_kind(name, "RayJob")["spec"]["submitterPodTemplate"]["spec"]] if name == "rayjob.yaml" else []
    for pod in (*pods(name), *submitters):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] != 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("name", WITH_PODS)
def test_every_mount_has_its_volume_and_memory_for_the_object_store_fits_its_pod(name: str) -> None:
    for pod in pods(name):
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
        (memory,) = (v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == "memory")
        assert 0.3 * _gib(container["resources"]["limits"]["memory"]) <= _gib(memory)


def _gib(quantity: str) -> float:
    return float(quantity.removesuffix("Gi"))


@pytest.mark.parametrize("name", WITH_PODS)
def test_connections_are_checked_and_ray_is_the_one_that_is_locked(name: str) -> None:
    spec = cluster(name)
    assert spec["authOptions"]["mode"] == "token"
    locked = (FOLDER.parents[1] / "requirements" / "cpu.lock").read_text(encoding="utf-8")
    assert f"ray=={spec['rayVersion']}\n" in locked


@pytest.mark.parametrize("name", WITH_PODS)
def test_gpus_are_asked_for_whole_and_limited_to_what_is_asked_for(name: str) -> None:
    for group in cluster(name)["workerGroupSpecs"]:
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["limits"] == resources["requests"]
        assert int(resources["limits"]["nvidia.com/gpu"]) in (4, 8)
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]  # a run does not grow under way


def test_the_job_is_one_that_rlsys_understands() -> None:
    words = shlex.split(of_kind("rayjob.yaml", "RayJob")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "rlsys.launch"]
    (recipe,) = (word.removeprefix("+recipe=") for word in words if word.startswith("+recipe="))
    config = run_config(*(word for word in words[3:] if not word.startswith("+recipe=")), recipe=recipe)
    assert config.cluster.kind == "ray"
    mounts = next(pods("rayjob.yaml"))["containers"][0]["volumeMounts"]
    assert any(config.run_root.startswith(mount["mountPath"] + "/") for mount in mounts)
    assert config.resume == "auto"  # it is started again where it breaks off


def test_the_job_and_the_standing_cluster_are_the_same_pods() -> None:
    assert cluster("rayjob.yaml") == cluster("raycluster.yaml")


def test_a_rack_is_one_domain_for_kubernetes_and_for_ray() -> None:
    domain = of_kind("nvl72.yaml", "ComputeDomain")
    assert domain["apiVersion"] == "resource.nvidia.com/v1beta1"
    jsonschema.validate(domain["spec"], COMPUTE_DOMAIN)
    (group,) = cluster("nvl72.yaml")["workerGroupSpecs"]
    assert domain["spec"]["numNodes"] == group["replicas"] == 18
    assert group["labels"] == {DOMAIN_LABEL: group["groupName"]}
    pod = group["template"]["spec"]
    (term,) = pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == DOMAIN_LABEL
    assert term["labelSelector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
    (claim,) = pod["resourceClaims"]
    assert claim["resourceClaimTemplateName"] == domain["spec"]["channel"]["resourceClaimTemplate"]["name"]
    assert {"name": claim["name"]} in pod["containers"][0]["resources"]["claims"]


def test_the_kustomization_names_files_that_are_there() -> None:
    (kustomization,) = manifests("kustomization.yaml")
    assert set(kustomization) <= {"apiVersion", "kind", "namespace", "resources", "images"}
    for name in kustomization["resources"]:
        assert manifests(name)
    (namespace,) = manifests("namespace.yaml")
    assert namespace["metadata"]["name"] == kustomization["namespace"]
    (image,) = kustomization["images"]
    for pod in pods("raycluster.yaml"):
        assert pod["containers"][0]["image"].partition(":")[0] == image["name"]
    (claim,) = manifests("shared.yaml")
    names = {
        volume.get("persistentVolumeClaim", {}).get("claimName") for volume in next(pods("raycluster.yaml"))["volumes"]
    }
    assert claim["metadata"]["name"] in names
