"""The search job, submitted and run directly: it measures, and stopped halfway leaves no process and no torn file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from raybsa.cluster.head import LocalHead, local_head
from raybsa.results.store import Store

ROOT = Path(__file__).parent.parent.parent
QUICK = ["--preset", "quick", "--workers", "1"]


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
    ("arguments", "message"),
    [
        (["--out", "/proc/nowhere"], "/proc/nowhere"),
        (["--out", "OUT", "--text", "EMPTY"], "empty"),
        (["--out", "OUT", "--text", "/no/such/text"], "got '/no/such/text', which does not exist"),
        (["--out", "OUT", "--objectives", "quality,beauty"], "objectives must be different ones of"),
        (["--out", "OUT", "--objectives", "quality,quality"], "objectives must be different ones of"),
        (["--out", "OUT", "--dry-run", "--text", "/no/such/text"], "got '/no/such/text', which does not exist"),
        (["--out", "OUT", "--dry-run", "--learning-rate", "-1"], "learning_rate must be a positive number, got -1.0"),
        (["--out", "OUT", "--distance", "1"], "distance must lie in "),
        (["--out", "OUT", "--cpus-per-worker", "1.5"], "whole CPUs or a fraction of one"),
        (["--out", "OUT", "--space", "BROKEN"], "found '<stream end>'"),
        (["--out", "OUT", "--captured", "BROKEN"], "must hold dicts with q, k and v"),
        (["--out", "OUT", "--seq-len", "-1"], "seq_len must be a positive integer, got -1"),
        (["--out", "s3:/bucket/results"], "a URI begins with s3://, a folder of that name with ./, got 's3:/bucket"),
        (["--out", "OUT", "--address", "ray://127.0.0.1:10001"], "this job runs within the cluster, which 'ray://"),
        (["--out", "OUT", "--address", "127.0.0.1:1"], "wanted at '127.0.0.1:1', nothing answers there"),
    ],
    ids=[
        "unwritable out", "empty text", "no such text", "unknown objective", "objective twice", "no text to list",
        "no learning rate", "no distance", "no share", "no YAML", "nothing captured", "no tokens",
        "a slash too few", "Ray Client", "no cluster",
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_starts(
    arguments: list[str], message: str, tmp_path: Path, refused: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").write_text("densities: [")
    places = {word: str(tmp_path / word.lower()) for word in ("OUT", "EMPTY", "BROKEN")}
    code, words = refused("search.py", *(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert words.startswith("jobs/search.py: ")
    assert message in words
    assert len(words.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--trials", "0", "a whole number from 1"),
        ("--workers", "-1", "a whole number from 1"),
        ("--wait", "-1", "a number from 0"),
        ("--limit", "soon", "a positive number"),
    ],
)
def test_a_number_that_is_none_is_refused_with_its_option(
    option: str, value: str, wanted: str, tmp_path: Path, refused: Callable[..., tuple[int, str]]
) -> None:
    code, words = refused("search.py", "--out", str(tmp_path), option, value)
    assert code == 2
    assert option in words.splitlines()[-1]
    assert words.endswith(f"{wanted} was wanted, got {value!r}\n")


@pytest.mark.parametrize("value", ["-1", "4294967296", "1.5", "x", ""])
@pytest.mark.parametrize(
    ("job", "option"),
    [
        ("search.py", "--seed"),
        ("train.py", "--seed"),
        ("benchmark.py", "--seed"),
        ("recovery_drill.py", "--seed"),
        ("compare.py", "--seeds"),
    ],
)
def test_a_seed_that_some_generator_would_refuse_is_refused_by_every_job(
    job: str, option: str, value: str, tmp_path: Path, refused: Callable[..., tuple[int, str]]
) -> None:
    code, words = refused(job, "--out", str(tmp_path), option, value)
    assert code == 2
    assert f"argument {option}: a seed in 0 .. 4294967295 was wanted, got {value!r}" in words.splitlines()[-1]


def test_a_submitted_job_is_refused_a_relative_results_folder(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., tuple[int, str]]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    code, words = refused("search.py", "--out", "relative")
    assert code == 2
    assert "--out must be absolute in a submitted job" in words


@pytest.mark.cluster
@pytest.mark.timeout(240)
def test_a_submitted_search_that_is_stopped_keeps_whole_records_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ends is in ``tests/platform/test_submitted_jobs.py``."""
    stopped = tmp_path / "stopped"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # a proxy that loopback must not go through
    with local_head(2) as head:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{head.address}/api/jobs/", timeout=10)
        submit = ["job", "submit", "--address", head.address, "--working-dir", str(ROOT)]
        job = ["python", "jobs/search.py", *QUICK, "--trials", "99", "--out", str(stopped)]
        started = ray_cli(head, *submit, "--no-wait", "--submission-id", "halfway", "--", *job)
        assert started.returncode == 0, started.stdout + started.stderr
        deadline = time.monotonic() + 90
        while not list(stopped.glob("records/*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert ray_cli(head, "job", "stop", "--address", head.address, "halfway").returncode == 0
        records = Store(str(stopped)).read_records()
        assert 1 <= len(records) < 99
        assert all(record.status == "ok" for record in records)
        assert "dense" in {record.pattern for record in records}
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


@pytest.mark.cluster
@pytest.mark.timeout(240)
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
def test_a_signal_ends_a_job_with_a_front_and_a_report_of_whole_records_and_no_process(tmp_path: Path) -> None:
    """SIGTERM, as a scheduler sends it; what Ctrl-C and SIGHUP do is the same but for the code (test_signals.py)."""
    mark, out = f"raybsa-test-{uuid.uuid4().hex}", tmp_path / "out"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "jobs" / "search.py"), "--out", str(out), *QUICK, "--trials", "500"],
        env=environment | {"RAYBSA_TEST": mark},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output = _interrupted_after_three(process, mark)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert output.endswith("jobs/search.py: ended by SIGTERM: the same command with --resume goes on\n")

    records = Store(str(out)).read_records()
    assert len(records) >= 3, output
    assert all(record.status == "ok" for record in records)
    files = (path for path in out.rglob("*") if path.is_file())
    kinds = {path.suffix for path in files if ".raybsa" not in path.parts}
    assert kinds <= {".parquet", ".html", ".json"}, "no temporary file stays"
    assert (out / "report.html").stat().st_size > 100_000, output
    assert (out / "front" / "01" / "best.json").exists(), output
    deadline = time.monotonic() + 20
    while processes_with(mark):
        assert time.monotonic() < deadline, processes_with(mark)
        time.sleep(0.2)


def _interrupted_after_three(process: subprocess.Popen[str], mark: str) -> str:
    """All that the job prints when SIGTERM comes after its third trial."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("3/500"):
            break
    assert processes_with(mark), "the mark must reach Ray's processes"
    process.send_signal(signal.SIGTERM)
    return "".join(lines) + process.communicate(timeout=60)[0]
