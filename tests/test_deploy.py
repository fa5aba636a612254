"""cluster.yaml and deploy/: as Ray's own validator reads them, and what that validator does not look at."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from ipaddress import ip_address, ip_network
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent
CLOUDS = ("deploy/aws.yaml", "deploy/gcp.yaml")
# ray.io_rayjobs.yaml, of helm-chart/kuberay-operator/crds in ray-project/kuberay
KUBERAY = os.environ.get("KUBERAY_CRD")


def read(file: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))


def pinned(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (version,) = (line.partition("==")[2] for line in lines if line.lower().startswith(f"{package}=="))
    return version


@pytest.fixture
def config() -> dict[str, Any]:
    return read("cluster.yaml")


def validate(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray makes of the file, once its validator has passed it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_accepts_the_file_and_starts_a_node_for_each_worker_address(config: dict[str, Any]) -> None:
    prepared = validate(config)
    (node_type,) = prepared["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == len(config["provider"]["worker_ips"])
    for side in ("head", "worker"):
        assert prepared[f"{side}_start_ray_commands"] == config[f"{side}_start_ray_commands"]


def test_ray_refuses_an_unknown_key(config: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="no_such_key"):
        validate({**config, "no_such_key": 1})


def test_the_provider_names_a_head_and_as_many_workers_as_are_started(config: dict[str, Any]) -> None:
    provider = config["provider"]
    assert provider["type"] == "local"
    assert provider["head_ip"]
    assert config["min_workers"] == config["max_workers"] == len(provider["worker_ips"]) > 0


def test_every_address_is_one_that_is_reserved_for_documentation(config: dict[str, Any]) -> None:
    """RFC 5737: nobody's machine is reached where the file was not edited."""
    provider = config["provider"]
    addresses = [ip_address(one) for one in (provider["head_ip"], *provider["worker_ips"])]
    assert all(address in ip_network("192.0.2.0/24") for address in addresses)
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("file", CLOUDS)
def test_ray_accepts_a_cloud_s_file_and_it_may_grow_by_machines_with_a_gpu(file: str) -> None:
    prepared = validate(read(file))
    head, gpu = (prepared["available_node_types"][name] for name in ("head", "gpu"))
    assert "GPU" not in head["resources"]
    assert gpu["resources"]["GPU"] == 1
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, prepared["max_workers"])


@pytest.mark.parametrize("file", CLOUDS)
def test_a_cloud_s_nodes_are_set_up_and_started_as_those_of_cluster_yaml(file: str, config: dict[str, Any]) -> None:
    cloud = read(file)
    for key in ("file_mounts", "rsync_exclude", "head_start_ray_commands", "worker_start_ray_commands"):
        assert cloud[key] == config[key]
    assert cloud["setup_commands"][-1:] == config["setup_commands"]


@pytest.mark.parametrize("side", ["head", "worker"])
def test_start_commands_say_how_to_authenticate_and_when_a_machine_counts_as_lost(
    config: dict[str, Any], side: str
) -> None:
    (start,) = (command for command in config[f"{side}_start_ray_commands"] if "ray start" in command)
    settings, _, _ = start.partition("ray start")
    names = {setting.partition("=")[0] for setting in settings.split()}
    assert "RAY_AUTH_MODE=token" in settings.split()
    assert {f"RAY_health_check_{what}" for what in ("period_ms", "timeout_ms", "failure_threshold")} <= names


def test_a_rayjob_runs_the_pinned_versions_with_a_token_and_notices_a_lost_host() -> None:
    job = read("deploy/rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == pinned("ray")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    for container in containers:
        assert container["image"].startswith(f"rayproject/ray:{pinned('ray')}-")
        names = {one["name"] for one in container["env"]}
        assert {f"RAY_health_check_{what}" for what in ("period_ms", "timeout_ms", "failure_threshold")} <= names
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert "nvidia.com/gpu" in containers[1]["resources"]["limits"]


def strict(schema: Any) -> Any:
    """The schema with what Kubernetes would silently drop, fields that it does not know, as an error."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(part) for name, part in schema.items()}
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    open_ended = "additionalProperties" in made or made.get("x-kubernetes-preserve-unknown-fields")
    if made.get("type") == "object" and "properties" in made and not open_ended:
        made["additionalProperties"] = False
    return made


@pytest.mark.skipif(KUBERAY is None, reason="KUBERAY_CRD names no ray.io_rayjobs.yaml of KubeRay")
def test_a_rayjob_fits_the_schema_of_kuberay() -> None:
    definition = yaml.safe_load(Path(str(KUBERAY)).read_text(encoding="utf-8"))
    (version,) = (one for one in definition["spec"]["versions"] if one["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    job = read("deploy/rayjob.yaml")
    jsonschema.validate(job, schema)
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        jsonschema.validate({**job, "spec": {**job["spec"], "backofLimit": 2}}, schema)


def test_the_packages_of_a_rayjob_are_those_of_the_project() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    given = yaml.safe_load(read("deploy/rayjob.yaml")["spec"]["runtimeEnvYAML"])["pip"]
    in_the_image = {"ray", "numpy"}
    wanted = {re.split(r"[>=\[]", one)[0] for one in project["dependencies"]} - in_the_image
    assert {f"{one}=={pinned(one)}" for one in wanted | {"triton"}} == {*given}


def told_to_submit(file: str) -> str:
    """The command after ``--`` of a cluster file's first lines."""
    head = re.sub(r"\\\n#\s+", "", (ROOT / file).read_text(encoding="utf-8"))
    (command,) = re.findall(r"ray job submit .* -- (.*)", head)
    return command


@cache
def help_of(job: str) -> str:
    command = [sys.executable, str(ROOT / job), "--help"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("file", CLOUDS)
def test_a_cloud_that_starts_gpu_machines_on_demand_is_asked_for_gpus(file: str) -> None:
    asked, gpu = told_to_submit(file).split(), read(file)["available_node_types"]["gpu"]
    given = dict(pairwise(asked))
    assert {"CPU": int(given["--cpus-per-worker"]), "GPU": int(given["--gpus-per-worker"])} == gpu["resources"]
    assert int(given["--workers"]) == gpu["max_workers"]
    assert int(given["--wait"]) >= 600, "a machine takes minutes to start"


@pytest.mark.parametrize(
    "command",
    [read("deploy/rayjob.yaml")["spec"]["entrypoint"], *map(told_to_submit, ("cluster.yaml", *CLOUDS))],
    ids=["rayjob", "cluster", "aws", "gcp"],
)
def test_what_is_submitted_is_a_job_with_arguments_that_it_knows(command: str) -> None:
    program, job, *arguments = command.split()
    assert program == "python"
    assert all(one in help_of(job) for one in arguments if one.startswith("--"))
