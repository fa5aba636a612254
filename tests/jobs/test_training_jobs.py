"""The train and recovery jobs as a user runs them."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from urllib.request import urlopen

import pytest
import ray

from raybsa.events import read
from raybsa.results.store import Store

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana.json"


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 60)
    return str(tmp_path / "text.txt")


@pytest.mark.cluster
def test_a_training_leaves_a_record_curves_and_a_checkpoint_from_which_it_goes_on(
    tmp_path: Path, text: str, ray_cluster: str, run_job: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    out = tmp_path / "out"
    shape = ["--tokens", "128", "--heads", "2", "--head-dim", "8", "--layers", "1", "--batch", "2", "--text", text]
    rest = ["--out", str(out), "--steps", "8", "--tell-every", "4", "--checkpoint-every", "4", "--codec", "int8"]
    first = run_job("train.py", *shape, *rest, "--address", ray_cluster, "--verbose", "--profile", "5")
    assert first.returncode == 0, first.stderr
    assert "step 8/8:" in first.stdout
    (record,) = Store(str(out)).read_records()
    assert (record.task, record.variant, record.pattern) == ("byte_lm", "distributed", "bigbird")
    assert record.quality_name == "bits_per_byte"
    assert record.quality is not None
    assert record.wire_bytes > 0
    assert_observed(first.stderr, record.trial_id)
    assert {file.name for file in (out / "profile").iterdir()} == {"rank0-step5.json", "rank1-step5.json"}
    losses = [point for point in Store(str(out)).read_series() if point.name == "train_loss"]
    assert [point.step for point in losses] == list(range(8))
    again = run_job("train.py", *shape, *rest, "--resume", "--world-size", "1", RAY_ADDRESS=ray_cluster)
    assert "resumed from the checkpoint of step 8" in again.stdout, again.stdout + again.stderr


def assert_observed(lines: str, trial: str) -> None:
    """Events say which rank made which step of which trial, and the cluster exports all that the dashboard draws of a
    run in which no ring breaks."""
    steps = [pairs for line in lines.splitlines() if (pairs := read(line)).get("event") == "step"]
    assert sorted((pairs["rank"], pairs["step"]) for pairs in steps) == sorted(product("01", map(str, range(8))))
    assert {(pairs["trial"], pairs["generation"]) for pairs in steps} == {(trial, "1")}
    panels = json.loads(GRAFANA.read_text())["panels"]
    drawn = set(re.findall(r"ray_raybsa_(\w+)", " ".join(t["expr"] for panel in panels for t in panel["targets"])))
    assert_exported(drawn - {"rebuilds_total"}, trial.rpartition("-")[0])


def assert_exported(wanted: set[str], run: str) -> None:
    deadline = time.monotonic() + 30  # Ray gathers them every ten seconds
    while wanted - (exported := set(re.findall(rf'ray_raybsa_(\w+){{[^}}]*run="{run}"', exposition()))):
        assert time.monotonic() < deadline, f"metrics {wanted} were wanted of {run}, there are {exported}"
        time.sleep(0.5)


def exposition() -> str:
    (node,) = ray.nodes()
    with urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10) as answer:
        return answer.read().decode()


@pytest.mark.cluster
def test_a_drill_says_when_a_fault_was_noticed_and_that_the_weights_are_equal(
    tmp_path: Path, text: str, ray_cluster: str, run_job: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_job(
        "recovery_drill.py", "--out", str(tmp_path / "out"), "--text", text, "--world-size", "2", "--spares", "0",
        "--fault", "sigkill:backward_hop", "driver:exchange", "--address", ray_cluster,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("sigkill at backward_hop 0")]
    assert "fresh" in line
    assert line.endswith("equal")
    (driver,) = [line for line in done.stdout.splitlines() if line.startswith("driver at exchange")]
    assert driver.split()[-2:] == ["resumed", "equal"]
    assert "2 of 2 faults as wanted" in done.stdout
    assert "(raylet)" not in done.stdout
    records = Store(str(tmp_path / "out")).read_records()
    assert len(records) == 3, "the run in peace, the one with a fault, the resumed"
    assert_exported({"rebuilds_total", "trials_total"}, records[0].run_id)


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("train.py", ["--pattern", "nonesuch"], "nonesuch"),
        ("train.py", ["--codec", "zip"], "unknown codec 'zip'; there are none, fp16"),
        ("train.py", ["--partition", "round"], "partition must be one of"),
        ("train.py", ["--text", "/nonesuch"], "text must be a file or a folder, got '/nonesuch'"),
        (
            "train.py",
            ["--world-size", "0"],
            "1 <= min_ranks <= world_size and spares >= 0, got min_ranks 1, world_size 0",
        ),
        (
            "train.py",
            ["--min-ranks", "9"],
            "1 <= min_ranks <= world_size and spares >= 0, got min_ranks 9, world_size 2",
        ),
        ("train.py", ["--heartbeat", "-1"], "a heartbeat is a positive number of seconds, got -1"),
        ("train.py", ["--checkpoint-every", "0"], "checkpoint_every must be a positive integer, got 0"),
        ("train.py", ["--batch", "0"], "train_batch must be a positive integer, got 0"),
        ("train.py", ["--tokens", "999999", "--text", "TEXT"], "text must be longer than train_len 999999"),
        ("train.py", ["--address", "127.0.0.1:1"], "wanted at '127.0.0.1:1', nothing answers there"),
        ("recovery_drill.py", ["--fault", "cuda_error:exchange"], "cuda_error: needs a GPU: --gpus-per-worker"),
        ("recovery_drill.py", ["--gpus-per-worker", "2"], "at most one GPU, got 1 CPU and 2 GPU"),
        ("recovery_drill.py", ["--world-size", "0"], "world_size 0"),
        ("recovery_drill.py", ["--heartbeat", "0"], "a heartbeat is a positive number of seconds, got 0"),
        ("recovery_drill.py", ["--text", "/nonesuch"], "got '/nonesuch', which does not exist"),
        ("recovery_drill.py", ["--address", "127.0.0.1:1"], "nothing answers there"),
        ("compression.py", ["--only", "nothing"], "--only must find some of the codecs"),
        ("compression.py", ["--world-size", "3"], "3 ranks must share train_batch evenly, got 4 windows"),
        ("compare.py", ["--task", "nonesuch"], "unknown task 'nonesuch'"),
        ("compare.py", ["--task", "speed", "--task-params", "{}"], "a task that trains, got 'speed'"),
        ("compare.py", ["--pattern", '{"a": 1}'], "a pattern dict has the keys 'name' and 'params', got {'a': 1}"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    tmp_path: Path, text: str, job: str, arguments: list[str], message: str, refused: Callable[..., tuple[int, str]]
) -> None:
    arguments = [text if argument == "TEXT" else argument for argument in arguments]
    code, words = refused(job, "--out", str(tmp_path / "out"), *arguments)
    assert code == 2
    assert words.startswith(f"jobs/{job}: ")
    assert message in words
    assert len(words.splitlines()) == 1


@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        ("overhead.py", ["--address", "127.0.0.1:1"]),
        ("recovery_rival.py", ["--address", "127.0.0.1:1"]),
        ("overhead.py", ["--text", "/nonesuch"]),
        ("recovery_rival.py", ["--text", "/nonesuch"]),
        ("overhead.py", ["--batch", "0"]),
        ("slow_link.py", ["--layers", "0"]),
    ],
)
def test_a_job_without_a_results_folder_answers_so_too(
    job: str, arguments: list[str], refused: Callable[..., tuple[int, str]]
) -> None:
    code, words = refused(job, *arguments)
    assert (code, len(words.splitlines())) == (2, 1)
    assert words.startswith(f"jobs/{job}: ")


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("train.py", ["--backend", "nonesuch"], "unknown backend 'nonesuch'; there are auto, "),
        ("train.py", ["--codec", '{"name":'], "a JSON object was wanted, got '{\"name\":': Expecting value"),
        ("train.py", ["--tell-every", "0"], "a whole number from 1 was wanted, got '0'"),
        ("recovery_drill.py", ["--fault", "flood:exchange"], "a fault is KIND:PLACE, a kind of exit"),
        ("recovery_drill.py", ["--soak", "0"], "a whole number from 1 was wanted, got '0'"),
        ("recovery_rival.py", ["--world-size", "1"], "a whole number from 2 was wanted, got '1'"),
        ("overhead.py", ["--steps", "4"], "a whole number from 5 was wanted, got '4'"),
        ("compression.py", ["--only", "["], "a regular expression was wanted, got '['"),
        ("compression.py", ["--seeds", "0"], "a whole number from 1 was wanted, got '0'"),
        ("compare.py", ["--device", "foo", "--out", "x"], "a device of this machine was wanted, got 'foo': "),
        ("compare.py", ["--device", "cuda:99", "--out", "x"], "a device of this machine was wanted, got 'cuda:99': "),
        ("compare.py", ["--task-params", "{", "--out", "x"], "a JSON object was wanted, got '{'"),
        ("compare.py", ["--task-params", "3", "--out", "x"], "a JSON object was wanted, got '3'"),
        ("compare.py", ["--pattern", '{"a"', "--out", "x"], "a JSON object was wanted, got '{\"a\"'"),
    ],
)
def test_an_option_s_value_that_is_none_is_named_with_its_option(
    job: str, arguments: list[str], message: str, refused: Callable[..., tuple[int, str]]
) -> None:
    code, words = refused(job, *arguments)
    assert code == 2
    assert f"error: argument {arguments[0]}: {message}" in words.splitlines()[-1]
