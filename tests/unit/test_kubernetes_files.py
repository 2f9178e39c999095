"""The Kubernetes files: fields that exist, and a cluster that Ray's autoscaler reads as the one that is meant.

The schema is in schemas/kubernetes.json, which says how it came about and why it is closed.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from orchestrator.cli.durations import parse_duration
from orchestrator.job import Job
from tests.unit.command_lines import calls_in_shell, parse
from tests.unit.test_cluster_files import MARKET, launched

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "examples/clusters"
FILES = [*sorted(CLUSTERS.glob("kuberay-*.yaml")), CLUSTERS / "podmonitor.yaml"]
SCHEMA = json.loads((Path(__file__).parent / "schemas/kubernetes.json").read_text())


def objects(*paths: Path) -> list[dict[str, Any]]:
    return [item for path in paths for item in yaml.safe_load_all(path.read_text())]


def of_kind(kind: str) -> dict[str, Any]:
    [found] = [item for item in objects(*FILES) if item["kind"] == kind]
    return dict(found)


def cluster_specs() -> dict[str, dict[str, Any]]:
    return {"RayCluster": of_kind("RayCluster")["spec"], "RayJob": of_kind("RayJob")["spec"]["rayClusterSpec"]}


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        spec["headGroupSpec"]["template"]["spec"],
        *(group["template"]["spec"] for group in spec["workerGroupSpecs"]),
    ]


def mistakes(item: dict[str, Any]) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(item)]


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("item", objects(*FILES), ids=lambda item: f"{item['kind']}-{item['metadata']['name']}")
def test_every_field_exists_and_is_of_its_type(item: dict[str, Any]) -> None:
    assert mistakes(item) == []


def _fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every field that a schema names, but not into maps whose keys are the user's own."""
    if isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _fields(entry, (*path, index))
    elif isinstance(value, dict) and not (path and path[-1] in FREE):
        for key, entry in value.items():
            yield (*path, key)
            yield from _fields(entry, (*path, key))


FREE = {"labels", "annotations", "nodeSelector", "rayStartParams", "requests", "limits", "data", "matchLabels"}


@pytest.mark.parametrize("item", objects(*FILES), ids=lambda item: f"{item['kind']}-{item['metadata']['name']}")
def test_every_field_misspelt_is_refused(item: dict[str, Any]) -> None:
    paths = list(_fields(item))
    assert len(paths) >= 5
    for path in paths:
        wrong = copy.deepcopy(item)
        parent = wrong
        for step in path[:-1]:
            parent = parent[step]
        parent[f"{path[-1]}s"] = parent.pop(path[-1])
        assert mistakes(wrong), f"{'.'.join(map(str, path))} + s"


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_rays_autoscaler_reads_the_cluster_that_is_meant(kind: str) -> None:
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    spec = cluster_specs()[kind]
    derived = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "c", "namespace": "default"}, "spec": spec})
    types = AutoscalingConfig(derived, skip_content_hash=True).get_node_type_configs()
    assert types is not None
    assert types["headgroup"].resources["CPU"] == 0
    assert types["headgroup"].labels[MARKET] == "on-demand"
    one = {"CPU": 4.0, "GPU": 1.0}
    most = types["gpu-spot"].max_worker_nodes
    assert launched(types, 1, one) == {"gpu-spot": 1}
    assert launched(types, 1, one, **{MARKET: "on-demand"}) == {"gpu-on-demand": 1}
    assert launched(types, most + 1, one, **{"ray.io/accelerator-type": "L4"}) == {"gpu-spot": most, "gpu-on-demand": 1}
    assert launched(types, 1, one, **{"ray.io/accelerator-type": "H100"}) == {"infeasible": 1}
    assert 0 < derived["idle_timeout_minutes"] <= 10


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_a_group_says_of_its_nodes_what_kubernetes_will_choose(kind: str) -> None:
    for group in cluster_specs()[kind]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        spot = pod["nodeSelector"].get("cloud.google.com/gke-spot") == "true"
        assert group["labels"][MARKET] == ("spot" if spot else "on-demand")
        assert spot or "DoesNotExist" in json.dumps(pod["affinity"]), "or on-demand pods would go to spot nodes, too"
        accelerator = pod["nodeSelector"]["cloud.google.com/gke-accelerator"]
        assert accelerator == f"nvidia-{group['labels']['ray.io/accelerator-type'].lower()}"


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_token_mode_autoscaler_v2_and_the_right_ray(kind: str) -> None:
    spec = cluster_specs()[kind]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert all("restartPolicy" not in pod for pod in pods(spec)), "KubeRay refuses any other than Never with v2"
    assert spec["rayVersion"] == ray.__version__
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_workers_start_under_the_watcher_and_have_time_to_drain(kind: str) -> None:
    assert of_kind(kind)["metadata"]["annotations"] == {"ray.io/overwrite-container-cmd": "true"}
    head, *rest = pods(cluster_specs()[kind])
    for pod in (head, *rest):
        [container] = pod["containers"]
        assert container["command"] == ["/bin/bash", "-c", "--"]
        [shell] = container["args"]
        assert "; exec " in shell, "bash would not pass SIGTERM on"
        assert subprocess.run(["bash", "-n", "-c", shell]).returncode == 0
        # KubeRay sets the variable to a whole `ray start ... --block`.
        calls = calls_in_shell(shell.replace("$KUBERAY_GEN_RAY_START_CMD", "ray start --address=head:6379 --block"))
        for call in calls:
            parse(call)
        assert ["ray", "start", "--address=head:6379", "--block"] in calls
        watched = [call for call in calls if call[:2] == ["orchestrator", "node-watcher"]]
        assert len(watched) == (pod is not head)
        for call in watched:
            grace_s = parse_duration("--grace", call[call.index("--grace") + 1])
            assert pod["terminationGracePeriodSeconds"] > grace_s + 30, "Ray may take 30 s to end after its drain"


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_a_gcs_finds_its_tables_again_when_its_container_is_started_again(kind: str) -> None:
    head, *rest = pods(cluster_specs()[kind])
    [container] = head["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["RAY_gcs_storage"] == "rocksdb"
    places = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "tables"}
    assert str(Path(environment["RAY_gcs_storage_path"]).parent) in places
    assert {"name": "tables", "emptyDir": {}} in head["volumes"], "which lives as long as the pod"
    for pod in (head, *rest):
        [container] = pod["containers"]
        assert {"name": "RAY_gcs_rpc_server_reconnect_timeout_s", "value": "600"} in container["env"]


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_every_pod_mounts_the_claim_and_has_the_same_image(kind: str) -> None:
    claim = of_kind("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    images = set()
    for pod in pods(cluster_specs()[kind]):
        [container] = pod["containers"]
        images.add(container["image"])
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert len(images) == 1
    [image] = images
    assert f"-t {image} ." in (CLUSTERS / "Dockerfile").read_text()


def test_the_ray_job_runs_a_right_job_again_after_a_loss(tmp_path: Path) -> None:
    ray_job, config_map = of_kind("RayJob")["spec"], of_kind("ConfigMap")
    assert ray_job["backoffLimit"] > 0
    assert "clusterSelector" not in ray_job, "KubeRay refuses it beside backoffLimit"
    assert ray_job["shutdownAfterJobFinishes"] is True
    [call] = calls_in_shell(ray_job["entrypoint"])
    parse(call)
    assert call[:2] == ["orchestrator", "run"]
    directory, name = call[2].rsplit("/", 1)
    [head, *_] = pods(ray_job["rayClusterSpec"])
    [mounted] = [mount for mount in head["containers"][0]["volumeMounts"] if mount["mountPath"] == directory]
    [volume] = [volume for volume in head["volumes"] if volume["name"] == mounted["name"]]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    assert call[call.index("--run-dir") + 1].startswith("/shared/"), "a new cluster must find the run again"

    (tmp_path / name).write_text(config_map["data"][name])
    job = Job.load(tmp_path / name)
    assert job.resources.market == ["spot", "on-demand"]
    groups = ray_job["rayClusterSpec"]["workerGroupSpecs"]
    assert job.elastic.workers.max <= sum(group["maxReplicas"] for group in groups)
    assert all(job.resources.cpu <= int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
               for group in groups)  # fmt: skip


def test_prometheus_finds_what_ray_and_the_runs_serve(tmp_path: Path) -> None:
    monitor, scrape = of_kind("PodMonitor")["spec"], of_kind("ScrapeConfig")["spec"]
    assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} == {
        "metrics",
        "as-metrics",
        "dash-metrics",
    }
    job = yaml.safe_load(of_kind("ConfigMap")["data"]["job.yaml"])
    from monitoring.install import Settings, prometheus_config

    ours = yaml.safe_load(prometheus_config(Settings(targets=Path(job["monitoring"]["targets"]))))
    [runs] = [entry for entry in ours["scrape_configs"] if entry["job_name"] == "orchestrator"]
    assert [entry["files"] for entry in scrape["fileSDConfigs"]] == [
        entry["files"] for entry in runs["file_sd_configs"]
    ]
    assert scrape["honorLabels"] is runs["honor_labels"] is True


def test_the_image_has_what_the_lock_file_and_make_install() -> None:
    text = (CLUSTERS / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{ray.__version__}-py3" in text
    [torch] = re.findall(r"torch==\S+", text)
    assert torch in (ROOT / "Makefile").read_text()
    copied = [word for line in text.splitlines() if line.startswith("COPY ") for word in line.split()[2:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"orchestrator", "strategies", "monitoring", "requirements.lock", "pyproject.toml"} <= set(copied)
