"""The training over ranks as a plain loop under torchrun, without Ray: what the coordinator is measured against.

    python -m torch.distributed.run --nproc_per_node=2 -m raybsa.tasks.plain SPEC.json ANSWER.json

SPEC.json is a TrialSpec as a dict; rank 0 writes when each step was applied (of ``time.time``) and the final digest.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from raybsa.comm import Communicator
from raybsa.spec import TrialSpec
from raybsa.tasks.sharded import ShardedTraining


def main(question: Path, answer: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    communicators = [Communicator(dist.group.WORLD), Communicator(dist.new_group(backend="gloo"))]
    training = ShardedTraining(TrialSpec.from_dict(json.loads(question.read_text())), torch.device("cpu"))
    training.bind(*communicators)
    applied_at = []
    while training.step < training.spec.train_steps:
        training.prepare()
        training.apply()
        applied_at.append(time.time())
    if dist.get_rank() == 0:
        answer.write_text(json.dumps({"applied_at": applied_at, "digest": training.digest()}))
    for communicator in communicators:
        communicator.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
