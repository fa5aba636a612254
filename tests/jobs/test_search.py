"""The search job as it is submitted: it measures, and stopped halfway it leaves no process and no torn file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from raybsa.cluster.head import LocalHead, local_head
from raybsa.results.store import Store

ROOT = Path(__file__).parent.parent.parent


def run_job(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "search.py"), *arguments]
    variables = os.environ | {"RAY_AUTH_MODE": "disabled"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60, check=False)


def ray_cli(head: LocalHead, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray.scripts.scripts", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=head.environment, cwd=ROOT, timeout=timeout, check=False
    )


def processes_with(word: str) -> list[str]:
    """Command lines and environments of this machine's processes that mention ``word``."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            except OSError:
                continue
            if word.encode() in text:
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--out", "relative"], {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "--out must be absolute in a submitted job"),
        (["--out", "/proc/nowhere"], {}, "/proc/nowhere"),
        (["--out", "OUT", "--text", "EMPTY"], {}, "empty"),
        (["--out", "OUT", "--objectives", "quality,beauty"], {}, "objectives must be different ones of"),
        (["--out", "OUT", "--trials", "0"], {}, "--trials must be at least 1, got 0"),
        (["--out", "OUT", "--workers", "-1"], {}, "--workers must be at least 1, got -1"),
        (["--out", "OUT", "--address", "127.0.0.1:1"], {}, "wanted at '127.0.0.1:1', nothing answers there"),
    ],
    ids=["relative out", "unwritable out", "empty text", "unknown objective", "no trials", "no workers", "no cluster"],
)
def test_bad_input_is_one_line_before_anything_starts(
    arguments: list[str], environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"OUT": str(tmp_path / "out"), "EMPTY": str(tmp_path / "empty")}
    done = run_job(*(places.get(argument, argument) for argument in arguments), **environment)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.cluster
@pytest.mark.timeout(240)
def test_a_submitted_search_ends_whole_and_a_stopped_one_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # a proxy that loopback must not go through
    with local_head(2) as head:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{head.address}/api/jobs/", timeout=10)
        submit = ["job", "submit", "--address", head.address, "--working-dir", str(ROOT)]
        job = ["python", "jobs/search.py", "--preset", "quick"]
        done = ray_cli(head, *submit, "--", *job, "--trials", "3", "--out", str(whole))
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"report:  {whole / 'report.html'}" in done.stdout
        assert "dense" in {record.pattern for record in Store(str(whole)).read_records()}
        assert len(Store(str(whole)).read_records()) == 3

        ray_cli(
            head,
            *submit,
            "--no-wait",
            "--submission-id",
            "halfway",
            "--",
            *job,
            "--trials",
            "99",
            "--out",
            str(stopped),
        )
        deadline = time.monotonic() + 90
        while not list(stopped.glob("records/*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert ray_cli(head, "job", "stop", "--address", head.address, "halfway").returncode == 0
        records = Store(str(stopped)).read_records()
        assert 1 <= len(records) < 99
        assert all(record.status == "ok" for record in records)
        assert not list(stopped.glob("**/*.tmp*"))
        deadline = time.monotonic() + 20
        while (left := _actors(head)) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not left
        port = head.address.rpartition(":")[2]
        assert processes_with(port)
    assert not processes_with(f"dashboard-port={port}")


def _actors(head: LocalHead) -> str:
    """What `ray list actors` shows as alive."""
    shown = ray_cli(head, "list", "actors", "--address", head.address, "--filter", "state=ALIVE", "--format", "json")
    assert shown.returncode == 0, shown.stderr
    return "" if "No resource in the cluster" in shown.stdout else shown.stdout.strip()
