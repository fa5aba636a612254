"""What may happen to a search, a training, a compaction and the app, and what must hold then."""

from __future__ import annotations

import random
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from raybsa.results.store import Store
from tests.chaos.cluster import Playground
from tests.chaos.folder import Results, damage, fill, make_room, remount, small_disk
from tests.chaos.job import SIGNALS, Job, codes_of

TRIALS = 8
TINY = [
    "--preset", "quick", "--space", "families", "--workers", "1", "--trials", str(TRIALS), "--seq-len", "256",
    "--train-len", "128", "--num-heads", "1", "--train-steps", "20",
]  # fmt: skip
STEPS = 40
Scenario = Callable[[random.Random, Playground, Path], None]


def search(place: Playground, results: Path, *more: str) -> Job:
    return Job("jobs/search.py", *TINY, "--resume", "--adopt", "--address", place.address, "--out", str(results), *more)


def signals_to_a_search(draw: random.Random, place: Playground, folder: Path) -> None:
    """The driver is killed or told to end, a worker is killed or hangs for a while, at any moment."""
    results = Results(folder / "results")
    for _ in range(2):
        job = search(place, results.root)
        job.wait_for(" · ", draw.randint(0, 3))
        time.sleep(draw.random())
        if draw.random() < 0.5:
            number = draw.choice([signal.SIGKILL, *SIGNALS])
            job.send(number)
            job.must_have_ended_well(*codes_of(number))
        elif draw.random() < 0.5:
            place.strike(signal.SIGKILL, "_Host", "_TrialActor")
        else:
            _hold(draw, place, "_Host", "_TrialActor")
        results.look()
    _finish(place, results)


def a_full_disk_under_a_search(draw: random.Random, place: Playground, folder: Path) -> None:
    with small_disk(folder, 16384) as disk:
        results = Results(disk / "results")
        job = search(place, results.root)
        job.wait_for(" · ", draw.randint(1, 4))
        fill(disk)
        job.must_have_ended_well(0, 1)
        results.look()
        make_room(disk)
        _finish(place, results)


def a_disk_that_becomes_read_only(draw: random.Random, place: Playground, folder: Path) -> None:
    with small_disk(folder, 32768) as disk:
        results = Results(disk / "results")
        job = search(place, results.root)
        job.wait_for(" · ", draw.randint(1, 4))
        remount(disk, "ro")
        job.must_have_ended_well(0, 1)
        results.look()
        refused = search(place, results.root)
        refused.must_have_ended_well(2)
        remount(disk, "rw")
        _finish(place, results)


def a_results_folder_that_is_deleted(draw: random.Random, place: Playground, folder: Path) -> None:
    """What the driver has measured comes back into it; what an earlier run left there is the user's to delete."""
    results = Results(folder / "results")
    job = search(place, results.root)
    job.wait_for(" · ", draw.randint(1, 4))
    shutil.rmtree(results.root)
    job.must_have_ended_well(0, 1)
    told = sum(" · " in line for line in job.lines)
    results.plant()
    held = len(results.look())
    assert held == told, f"{told} trials were measured, {held} are in the folder:\n{job.text}"
    _finish(place, results)


def damaged_rows(draw: random.Random, place: Playground, folder: Path) -> None:
    """The one that is damaged is told and asked again; no other is."""
    results = Results(folder / "results")
    job = search(place, results.root, "--trials", "4")
    job.must_have_ended_well(0)
    results.look()
    victim = draw.choice(sorted((results.root / "records").glob("*.parquet")))
    damage(victim, draw.choice(["cut", "empty"]))
    del results.seen[victim.stem]
    again = search(place, results.root)
    again.must_have_ended_well(0)
    assert victim.name in again.text, f"the damaged file should be named:\n{again.text}"
    results.must_be_complete(TRIALS)


def clocks_that_jump(draw: random.Random, place: Playground, folder: Path) -> None:
    """A worker's time of day neither ends a search nor keeps it from its end."""
    results = Results(folder / "results")
    place.shift(draw.choice([-1, 1]) * draw.uniform(60, 1e6))
    try:
        job = search(place, results.root, "--time-budget", "150s")
        job.wait_for(" · ", draw.randint(1, 4))
        place.shift(draw.uniform(-1e6, 1e6))
        job.must_have_ended_well(0)
        assert place.was_shifted
        assert f"0 of {TRIALS} trials" not in job.text, f"they should run whatever workers' clocks say:\n{job.text}"
        _finish(place, results)
    finally:
        place.shift(0)


def two_drivers(draw: random.Random, place: Playground, folder: Path) -> None:
    """In one folder: no question is asked by both. One of them may be killed."""
    results = Results(folder / "results")
    both = [search(place, results.root), search(place, results.root)]
    both[0].wait_for(" · ", draw.randint(1, 3))
    if draw.random() < 0.5:
        both[0].send(signal.SIGKILL)
    for job in both:
        job.must_have_ended_well(0, 1, -signal.SIGKILL)
    results.look()
    _finish(place, results)


def a_compaction_beside_a_search(draw: random.Random, place: Playground, folder: Path) -> None:
    results = Results(folder / "results")
    job = search(place, results.root)
    for _ in range(3):
        job.wait_for(" · ", 1)
        compaction = Job("-m", "raybsa.results", "compact", str(results.root))
        time.sleep(draw.uniform(0, 3))
        if draw.random() < 0.7:
            compaction.send(signal.SIGKILL)
        compaction.end()
        results.look()
    job.must_have_ended_well(0)
    _finish(place, results)


def the_app_beside_trouble(draw: random.Random, place: Playground, folder: Path) -> None:
    """It goes on showing what can be read."""
    results = Results(folder / "results")
    search(place, results.root, "--trials", "3").must_have_ended_well(0)
    results.look()
    app = Job("-m", "dashboards.app", str(results.root), "--port", "0")
    assert app.wait_for("http://"), app.text
    address = next(word for word in app.text.split() if word.startswith("http://"))
    victim = draw.choice(sorted((results.root / "records").glob("*.parquet")))
    damage(victim, draw.choice(["cut", "empty"]))
    del results.seen[victim.stem]
    job = search(place, results.root)
    job.wait_for(" · ", 2)
    app.send(signal.SIGSTOP)
    time.sleep(draw.random())
    app.send(signal.SIGCONT)
    with urllib.request.urlopen(address, timeout=60) as page:
        assert page.status == 200
    job.must_have_ended_well(0)
    app.send(signal.SIGTERM)
    app.end()
    results.look()


def signals_to_a_training(draw: random.Random, place: Playground, folder: Path) -> None:
    """No step is lost but by SIGKILL, and in the end it has the record of a training in peace."""
    results, text = Results(folder / "results"), folder / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 60)
    for _ in range(2):
        job = training(place, results.root, text)
        job.wait_for("step ", draw.randint(1, 3))
        number = draw.choice([signal.SIGKILL, *SIGNALS])
        victim = draw.choice(["driver", "rank", "hang"])
        if victim == "driver":
            job.send(number)
            job.must_have_ended_well(*codes_of(number))
            if number != signal.SIGKILL and job.end():
                assert "the checkpoint of step" in job.text, job.text
        elif victim == "rank":
            place.strike(signal.SIGKILL, "MemberActor")
            job.must_have_ended_well(0)
        else:
            _hold(draw, place, "MemberActor")
            job.must_have_ended_well(0)
    last = training(place, results.root, text)
    last.must_have_ended_well(0)
    assert {round(record.quality or 0, 4) for record in results.look()} == {_in_peace(place, folder, text)}


def a_full_disk_under_a_training(draw: random.Random, place: Playground, folder: Path) -> None:
    """It is said once; no rank is lost for it; with room again there is a record."""
    text = folder / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 60)
    with small_disk(folder, 2048) as disk:
        results = Results(disk / "results")
        job = training(place, results.root, text)
        job.wait_for("step ", draw.randint(1, 3))
        fill(disk)
        job.must_have_ended_well(0, 1)
        assert "0 recoveries" in job.text, job.text
        assert sum("could not be written to" in line and "the training goes on" in line for line in job.lines) <= 1
        make_room(disk)
        training(place, results.root, text).must_have_ended_well(0)
        assert results.look()


def training(place: Playground, results: Path, text: Path, *more: str) -> Job:
    shape = [
        "--tokens",
        "128",
        "--heads",
        "2",
        "--head-dim",
        "8",
        "--layers",
        "1",
        "--batch",
        "2",
        "--dtype",
        "float64",
    ]
    steps = ["--steps", str(STEPS), "--tell-every", "5", "--checkpoint-every", "5", "--wait", "120", "--heartbeat", "8"]
    where = ["--address", place.address, "--out", str(results), "--text", str(text), "--resume", "--adopt"]
    return Job("jobs/train.py", *shape, *steps, *where, *more)


def _in_peace(place: Playground, folder: Path, text: Path) -> float:
    job = training(place, folder / "peace", text)
    job.must_have_ended_well(0)
    (record,) = Store(str(folder / "peace")).read_records()
    return round(record.quality or 0, 4)


def _hold(draw: random.Random, place: Playground, *names: str) -> None:
    """A worker hangs for a while."""
    pid = place.strike(signal.SIGSTOP, *names)
    time.sleep(draw.uniform(0.5, 3))
    if pid is not None and pid in place.workers(*names):
        place.strike(signal.SIGCONT, *names)


def _finish(place: Playground, results: Results) -> None:
    """With nothing in its way a search ends well, and every question is answered once."""
    search(place, results.root).must_have_ended_well(0)
    results.must_be_complete(TRIALS)


SCENARIOS: tuple[Scenario, ...] = (
    signals_to_a_search,
    signals_to_a_training,
    a_full_disk_under_a_search,
    a_results_folder_that_is_deleted,
    clocks_that_jump,
    damaged_rows,
    a_full_disk_under_a_training,
    a_disk_that_becomes_read_only,
    two_drivers,
    a_compaction_beside_a_search,
    the_app_beside_trouble,
)
