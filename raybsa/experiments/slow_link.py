"""Compressed gradients over a link between two hosts that lets only so much through: what a step takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybsa.experiments.hosts import LINK, TwoHosts, two_hosts
from raybsa.scratch import scratch
from raybsa.spec import TrialSpec

_LIMIT_S = 600.0


@dataclass(frozen=True)
class OverLink:
    """A training over a link of ``megabits`` a second and direction: the mean step, and what each rank sent in one."""

    megabits: int
    codec: dict[str, Any]
    step_ms: float
    sent_bytes: int


def over_links(specs: Sequence[TrialSpec], megabits: Sequence[int]) -> Iterator[OverLink]:
    """Each training (task "compression", two ranks) on two hosts of this machine, over each link.

    Raises:
        OSError: namespaces or ``tc`` are not to be had here.
        RuntimeError: a rank failed; the message ends with its last words.
    """
    with two_hosts() as hosts:
        for rate in megabits:
            hosts.limit(rate)
            for spec in specs:
                yield _train(hosts, rate, spec)


def _train(hosts: TwoHosts, megabits: int, spec: TrialSpec) -> OverLink:
    with scratch("link") as folder:
        question, answer = Path(folder, "question.json"), Path(folder, "answer.json")
        question.write_text(json.dumps(spec.to_dict()))
        ranks = [_start(hosts, rank, folder, question, answer) for rank in range(2)]
        try:
            for process in ranks:
                said = process.communicate(timeout=_LIMIT_S)[0]
                if process.returncode:
                    raise RuntimeError(f"a rank ended with status {process.returncode}: {said[-2000:]}")
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        found = json.loads(answer.read_text())
    steps = len(found["losses"])
    milliseconds = 1e3 * found["train_seconds"] / steps
    return OverLink(megabits, spec.task_params["codec"], milliseconds, found["sent_bytes"] // steps)


def _start(hosts: TwoHosts, rank: int, folder: str, question: Path, answer: Path) -> subprocess.Popen[str]:
    module = [sys.executable, "-m", "raybsa.tasks.compression_ranks", str(rank), "2", os.path.join(folder, "store")]
    words = hosts.command((hosts.first, hosts.second)[rank], *module, str(question), str(answer))
    environment = os.environ | {"GLOO_SOCKET_IFNAME": LINK, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
