"""Versions of a job's processes."""

from __future__ import annotations

import platform
from importlib import metadata

import pytest

from raybsa.cluster import versions as module
from raybsa.cluster.versions import VersionMismatch, require, versions


def test_this_process_has_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    require(versions())
    builds = {"torch": "2.13.0+cu130", "ray": "2.60.0"}
    monkeypatch.setattr(module, "version", builds.__getitem__)
    assert versions() == {"python": platform.python_version().rpartition(".")[0], "ray": "2.60.0", "torch": "2.13.0"}


def test_another_version_is_named_with_its_machine() -> None:
    with pytest.raises(VersionMismatch) as raised:
        require(versions() | {"torch": "1.0"})
    assert f"machine {platform.node()} has torch {metadata.version('torch').partition('+')[0]} instead of 1.0" in str(
        raised.value
    )
    assert "ray" not in str(raised.value)
