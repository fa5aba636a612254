"""jobs/search.py run directly: bad input is refused before anything starts, and Ctrl-C ends it in order."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from jobs import search as job
from raybsa.results.store import Store

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "/no/such/text"], "got '/no/such/text', which does not exist"),
        (["--objectives", "quality,quality"], "must be different ones"),
        (["--seq-len", "-1"], "seq_len must be a positive integer, got -1"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(sys, "argv", ["search.py", "--out", str(tmp_path / "out"), *arguments])
    monkeypatch.setattr(job, "cluster", lambda address: pytest.fail("nothing should have started"))
    with pytest.raises(ValueError, match=message):
        job.main()


def processes_marked(mark: str) -> list[str]:
    """Command lines of every process that inherited the environment variable ``mark``, from whatever parent."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environ.read_bytes():
                found.append((environ.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.mark.cluster
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
def test_ctrl_c_ends_a_job_with_a_report_of_whole_records_and_no_process(tmp_path):
    mark = f"raybsa-test-{uuid.uuid4().hex}"
    command = [sys.executable, "-u", str(ROOT / "jobs" / "search.py"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--preset", "quick", "--trials", "500"],
        env={**os.environ, "RAYBSA_TEST": mark},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("3/500"):
            break
    assert processes_marked(mark), "the mark must reach Ray's processes"
    process.send_signal(signal.SIGINT)
    lines += process.communicate(timeout=60)[0].splitlines(keepends=True)
    output = "".join(lines)
    assert process.returncode == 128 + signal.SIGINT, output

    records = Store(tmp_path / "out").read_records()
    assert len(records) >= 3, output
    assert all(record.status == "ok" for record in records)
    kinds = {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert kinds <= {".parquet", ".html", ".json"}, "no temporary file stays"
    assert (tmp_path / "out" / "report.html").stat().st_size > 100_000, output
    deadline = time.monotonic() + 20
    while processes_marked(mark):
        assert time.monotonic() < deadline, processes_marked(mark)
        time.sleep(0.2)
