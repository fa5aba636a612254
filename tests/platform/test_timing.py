"""Timing: quantiles of single calls, memory that was truly held, and a lock that keeps neighbours away."""

import os
import pwd
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch

from raybsa import locks, timing
from raybsa.experiments.lock_watch import LockWatch
from raybsa.locks import PATIENCE_S
from raybsa.timing import DeviceLock, forward_backward_call, forward_call, measure_in_turn, peak_bytes

MEBI = 1 << 20


def test_quantiles_are_those_of_the_single_calls(monkeypatch):
    ticks = iter(range(10_000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    seconds = [0.001 * (i % 10) for i in range(20)]
    marks = [0.0, 0.0]  # the estimate
    for duration in seconds:
        marks += [float(next(ticks)), 0.0]
        marks[-1] = marks[-2] + duration
    clock = iter(marks)
    (found,) = measure_in_turn([lambda: None], "cpu", warmup=0, repeats=20)
    wanted = torch.tensor(seconds, dtype=torch.float64).mul(1e3).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    assert (found.p20, found.p50, found.p80) == pytest.approx(wanted.tolist(), rel=1e-6)
    assert found.repeats == 20


def test_a_slow_outlier_does_not_move_the_median():
    calls = iter([0.0] * 3 + [0.2] + [0.0] * 40)
    (found,) = measure_in_turn([lambda: time.sleep(next(calls))], "cpu", warmup=2, repeats=9)
    assert found.p80 < 100


def test_a_sleep_is_timed_as_long_as_it_is():
    (found,) = measure_in_turn([lambda: time.sleep(0.01)], "cpu", warmup=0, repeats=5)
    assert 10 <= found.p20 <= found.p50 <= found.p80


def test_the_budget_bounds_the_repeats_but_five_stay():
    calls = []
    (found,) = measure_in_turn([lambda: calls.append(time.sleep(0.02))], "cpu", warmup=1, repeats=100, budget_s=0.01)
    assert found.repeats == 5
    assert len(calls) == 1 + 1 + 5


def test_peak_memory_counts_what_is_alive_at_once():
    def two_at_once():
        a = torch.empty(4 * MEBI, dtype=torch.uint8)
        b = torch.empty(8 * MEBI, dtype=torch.uint8)
        del a, b
        return torch.empty(MEBI, dtype=torch.uint8)

    assert 12 * MEBI <= peak_bytes(two_at_once, "cpu") <= 12 * MEBI + 4096


def test_peak_memory_sees_inside_an_operator():
    """A determinant is one number; the factorised copy that it needs is never a tensor of ours."""
    x = torch.randn(1024, 1024)
    assert peak_bytes(lambda: torch.linalg.det(x), "cpu") >= x.nbytes


def test_peak_memory_does_not_count_what_was_there_before():
    before = torch.empty(64 * MEBI, dtype=torch.uint8)
    assert peak_bytes(lambda: before.view(-1), "cpu") == 0


def test_forward_runs_without_autograd_and_backward_gives_every_gradient():
    seen = []

    def attend(q, k, v):
        seen.append(torch.is_grad_enabled())
        return q * k + v

    inputs = tuple(torch.randn(3) for _ in range(3))
    forward_call(attend, inputs)()
    dq, dk, dv = forward_backward_call(attend, inputs)()
    assert seen == [False, True]
    torch.testing.assert_close((dq, dk, dv), (inputs[1], inputs[0], torch.ones(3)))
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in inputs)


# ---- the lock: each holder opens the files anew, so that threads meet in it as processes do --------------------------


def _compute_in_slices(folder, begun, stop):
    lock = DeviceLock("cpu", folder)
    while not stop.is_set():
        with lock.shared():
            begun.set()
            time.sleep(0.002)


@pytest.fixture
def neighbour(tmp_path):
    """Starts threads that compute all the time in short slices; each returns the event that says so."""
    stop, threads = threading.Event(), []

    def start():
        begun = threading.Event()
        threads.append(threading.Thread(target=_compute_in_slices, args=(str(tmp_path), begun, stop)))
        threads[-1].start()
        return begun

    yield start
    stop.set()
    for thread in threads:
        thread.join(10)


def test_a_timer_gets_in_among_many_who_compute_all_the_time(tmp_path, neighbour):
    begun = [neighbour() for _ in range(4)]
    assert all(event.wait(10) for event in begun)
    start = time.perf_counter()
    for _ in range(5):
        with DeviceLock("cpu", str(tmp_path)).exclusive():
            pass
    assert time.perf_counter() - start < 5


def test_nobody_computes_while_someone_times(tmp_path, neighbour):
    with DeviceLock("cpu", str(tmp_path)).exclusive():
        computed = neighbour()
        assert not computed.wait(0.3)
    assert computed.wait(10)


def test_two_timers_never_meet(tmp_path):
    inside, worst = [], []

    def time_something():
        for _ in range(5):
            with DeviceLock("cpu", str(tmp_path)).exclusive():
                inside.append(1)
                time.sleep(0.002)
                worst.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=time_something) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert worst == [1] * 15


def test_those_who_compute_share(tmp_path, neighbour):
    with DeviceLock("cpu", str(tmp_path)).shared():
        assert neighbour().wait(10)


def test_the_death_of_a_holder_frees_the_device(tmp_path):
    script = (
        "import sys, time; from raybsa.timing import DeviceLock\n"
        "with DeviceLock('cpu', sys.argv[1]).exclusive(): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout.readline() == "held\n"
        freed = threading.Thread(target=_hold_once, args=(str(tmp_path),), daemon=True)
        freed.start()
        freed.join(0.2)
        assert freed.is_alive(), "the holder lives, so the device is taken"
        victim.kill()
        freed.join(10)
        assert not freed.is_alive()


def _hold_once(folder):
    with DeviceLock("cpu", folder).exclusive():
        pass


def test_an_error_inside_frees_the_device(tmp_path):
    lock = DeviceLock("cpu", str(tmp_path))
    with pytest.raises(RuntimeError, match="inside"), lock.exclusive():
        raise RuntimeError("inside")
    with lock.exclusive():
        pass


def test_a_lock_is_everybodys_whatever_the_umask_of_who_came_first(tmp_path):
    before = os.umask(0o077)
    try:
        with DeviceLock("cpu", str(tmp_path)).shared():
            pass
    finally:
        os.umask(before)
    assert [stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()] == [0o644, 0o644]


def test_a_lock_that_another_user_keeps_shut_fails_no_trial(tmp_path, monkeypatch, capfd):
    opened, own = os.open, f"-{os.geteuid()}"

    def shut(path, *rest):
        if str(path).startswith(str(tmp_path)) and not str(path).endswith(own):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", shut)
    for _ in range(2):
        with DeviceLock("cpu", str(tmp_path)).exclusive():
            pass
    assert capfd.readouterr().err.count("may only be read by its owner") == 2, "a gate and a lock, once each"


def test_who_waits_is_told_once_who_holds_the_device_and_that_it_was_stopped(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(locks, "PATIENCE_S", 0.05)
    script = (
        "import sys, time; from raybsa.timing import DeviceLock\n"
        "with DeviceLock('cpu', sys.argv[1]).shared(): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        os.kill(holder.pid, signal.SIGSTOP)
        waiting = threading.Thread(target=_hold_once, args=(str(tmp_path),), daemon=True)
        waiting.start()
        told, end, said = "", time.monotonic() + 20, []
        watch = LockWatch(said.append, lambda: [str(path) for path in tmp_path.iterdir()])
        while "\n" not in told and time.monotonic() < end:
            time.sleep(0.05)
            told += capfd.readouterr().err
        watch.look(0.0)
        watch.look(PATIENCE_S)
        watch.look(2 * PATIENCE_S)
        holder.kill()
        waiting.join(10)
    user = pwd.getpwuid(os.geteuid()).pw_name
    words = f"process {holder.pid} of {user} on {socket.gethostname()}, since "
    for line in (told.strip(), *said):
        assert words in line
        assert f"(stopped: kill -CONT {holder.pid} lets it go on)" in line
    assert len(said) == 1
    assert "waiting for" not in capfd.readouterr().err, "once"
