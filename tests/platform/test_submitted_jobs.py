"""A cluster of two hosts under a token: jobs come over HTTP from a third, and the link between the two is cut."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from raybsa.experiments.hosts import FIRST, SECOND, TwoHosts, two_hosts
from raybsa.results.store import Store
from tests.platform.hosts import DOOR, outside, ray_node

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]
ROOT = Path(__file__).parents[2]
STEPS = 60
HEAD = [
    "--head", "--port", "6399", "--node-ip-address", FIRST, "--num-cpus", "1", "--dashboard-host", "0.0.0.0",
    "--no-monitor",
    "--object-store-memory", str(100 << 20), "--disable-usage-stats", "--include-log-monitor", "false",
]  # fmt: skip
WORKER = [
    "--address", f"{FIRST}:6399", "--node-ip-address", SECOND, "--num-cpus", "1",
    "--object-store-memory", str(100 << 20), "--disable-usage-stats", "--include-log-monitor", "false",
]  # fmt: skip
SMALL = ["--num-heads", "2", "--head-dim", "8"]
BENCHMARK = ["jobs/benchmark.py", "--pattern", "sliding_window", "--lengths", "128", "--repeats", "2"]
SEARCH = ["jobs/search.py", "--preset", "quick", "--trials", "1", "--workers", "1", "--seq-len", "128", *SMALL]
TRAIN = [
    "jobs/train.py", "--tokens", "128", "--heads", "2", "--head-dim", "8", "--layers", "1", "--batch", "2",
    "--steps", str(STEPS), "--checkpoint-every", "5", "--heartbeat", "1.5",
]  # fmt: skip


def test_jobs_from_outside_end_well_and_nothing_is_lost_though_the_link_between_the_hosts_was_cut(
    tmp_path: Path,
) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 60)
    try:
        with two_hosts() as hosts, outside(hosts) as client:
            submitted = _submit_and_cut(hosts, client, tmp_path)
    except OSError as error:
        pytest.skip(f"network namespaces are not allowed here: {error}")
    for job, (code, words) in submitted.items():
        assert code == 0, f"{job}: {words[-3000:]}"
    rows = {job: Store(tmp_path / job).read_records() for job in submitted}
    assert [len(found) for found in rows.values()] == [1, 1, 1]
    assert {row.status for found in rows.values() for row in found} == {"ok"}
    (trained,) = rows["train"]
    assert trained.failures_survived >= 1, submitted["train"]
    losses = [point.step for point in Store(tmp_path / "train").read_series() if point.name == "train_loss"]
    assert sorted(losses) == list(range(STEPS)), "every step's loss was told"


def _submit_and_cut(hosts: TwoHosts, client: str, folder: Path) -> dict[str, tuple[int, str]]:
    """The exit code and output of ``ray job submit`` of each job."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # jobs run `python`: this one

    def submit(job: str, *words: str) -> subprocess.Popen[str]:
        ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", f"http://{DOOR}:8265"]
        entry = ["python", *words, "--out", (folder / job).as_uri()]  # no report is drawn into a URI
        command = hosts.command(client, *ray, "--working-dir", str(ROOT), "--", *entry)
        environment = os.environ | token
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
        )

    text = ["--text", str(folder / "text.txt")]
    with (
        tempfile.TemporaryDirectory(prefix="raybsa-", ignore_cleanup_errors=True) as disk,  # each host's own
        ray_node(hosts, hosts.first, *HEAD, "--temp-dir", f"{disk}/first", **token, **path),
        ray_node(hosts, hosts.second, *WORKER, "--temp-dir", f"{disk}/second", **token, **path),
    ):
        assert "401" in _ask_without_a_token(hosts, client)
        ended = {"benchmark": _end_of(submit("benchmark", *BENCHMARK))}
        ended["search"] = _end_of(submit("search", *SEARCH, *text))
        training = submit("train", *TRAIN, *text)
        _wait_for(folder / "train" / "checkpoints" / "step-000000005.ckpt", training)
        subprocess.run(hosts.cut(), check=True)
        time.sleep(4.0)  # longer than the heartbeat
        subprocess.run(hosts.heal(), check=True)
        return ended | {"train": _end_of(training)}


def _ask_without_a_token(hosts: TwoHosts, client: str) -> str:
    program = f"import urllib.request as r; r.urlopen('http://{DOOR}:8265/api/jobs/')"
    asked = subprocess.run(
        hosts.command(client, sys.executable, "-c", program), capture_output=True, text=True, timeout=30, check=False
    )
    return asked.stderr


def _end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    words, _ = process.communicate(timeout=180)
    return process.returncode, words


def _wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{file.name} was wanted: {process.communicate()[0][-3000:]}")
        time.sleep(0.01)
