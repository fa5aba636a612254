"""measure_compression: a trial of task ``"compression"`` on processes of this host, one thread a rank, over gloo.

    python -m raybsa.tasks.compression_ranks RANK WORLD_SIZE STORE SPEC.json ANSWER.json

is one rank alone, for who puts them on hosts of their own: STORE is a file that all see, and rank 0 answers.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raybsa.results.record import Measurement
from raybsa.scratch import scratch
from raybsa.spec import TrialSpec
from raybsa.tasks.compression import Compressed, compression_params, train_compressed
from raybsa.timing import device_name

_TIMEOUT_S = 300.0
_CURVE_POINTS = 100


def measure_compression(spec: TrialSpec) -> Measurement:
    """Trains it to the end.

    The curves are ``train_loss`` (nats a token, means of stretches of steps) and ``sent_bytes``, by step.

    Raises:
        ValueError: parameters that do not fit.
        RuntimeError: a rank failed; the message is that of the first.
    """
    world_size = compression_params(spec)[2]
    with scratch("compression") as folder:
        answer = Path(folder, "answer.json")
        arguments = (world_size, os.path.join(folder, "store"), spec, answer)
        try:
            mp.start_processes(_take_part, arguments, nprocs=world_size, start_method="spawn")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error
        found = json.loads(answer.read_text())
    return _measurement(Compressed(**found | {"losses": tuple(found["losses"])}), world_size)


def _take_part(rank: int, world_size: int, store: str, spec: TrialSpec, answer: Path) -> None:
    """One rank's process: meets the others in the file ``store``, trains, answers if it is rank 0, and ends without
    taking anything down.

    Gloo's threads still hold work of DDP's hook then; where the interpreter or the group ends before them, the process
    aborts, once in some dozens of trainings.
    """
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=_TIMEOUT_S)
    shared = dist.FileStore(store, world_size)
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=world_size, timeout=limit)
    found = train_compressed(spec, dist.group.WORLD)
    if rank == 0:
        answer.write_text(json.dumps(asdict(found)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _measurement(found: Compressed, world_size: int) -> Measurement:
    steps = len(found.losses)
    stretch = max(1, steps // _CURVE_POINTS)
    starts = range(0, steps, stretch)
    curves = [("train_loss", i, sum(part := found.losses[i : i + stretch]) / len(part)) for i in starts]
    return Measurement(
        density=1.0,
        quality_name="bits_per_byte",
        quality_goal="min",
        quality=found.bits_per_byte,
        train_seconds=found.train_seconds,
        wire_bytes=found.sent_bytes,
        needed_forward_bytes=None,
        world_size=world_size,
        devices=len(os.sched_getaffinity(0)),
        device="cpu",
        device_name=device_name(torch.device("cpu")),
        num_threads=1,
        torch_version=torch.__version__,
        python_version=platform.python_version(),
        curves=(*curves, ("uncompressed_bytes", steps, float(found.uncompressed_bytes))),
    )


if __name__ == "__main__":
    _, own_rank, ranks, meeting, question, answer = sys.argv
    asked = TrialSpec.from_dict(json.loads(Path(question).read_text()))
    _take_part(int(own_rank), int(ranks), meeting, asked, Path(answer))
