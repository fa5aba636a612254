"""cluster.yaml as Ray's own validator reads it, and what that validator does not look at."""

from __future__ import annotations

import copy
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


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


@pytest.mark.parametrize("side", ["head", "worker"])
def test_start_commands_say_how_to_authenticate_and_when_a_machine_counts_as_lost(
    config: dict[str, Any], side: str
) -> None:
    (start,) = (command for command in config[f"{side}_start_ray_commands"] if "ray start" in command)
    settings, _, _ = start.partition("ray start")
    names = {setting.partition("=")[0] for setting in settings.split()}
    assert "RAY_AUTH_MODE=token" in settings.split()
    assert {f"RAY_health_check_{what}" for what in ("period_ms", "timeout_ms", "failure_threshold")} <= names
