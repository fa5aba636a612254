"""The driver of ``test_lost_host.py`` on the first of two hosts: trains over both, and has the link cut.

    lost_host_program.py TEXT CUT...

CUT is the command that cuts the link; the last line of the output is JSON.
"""

import json
import subprocess
import sys
import time

import ray

from raybsa.cluster.member import Member, MemberSettings
from raybsa.cluster.membership import Seat
from raybsa.cluster.resources import Share
from raybsa.cluster.training import TrainingCoordinator
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec


def main(text: str, *cut: str) -> None:
    ray.init(address="10.77.41.1:6399", log_to_driver=False, logging_level="ERROR")
    attention = AttentionSpec("distributed", PatternSpec("bigbird"), 0.5, 16)
    params = {"text": text, "train_batch": 2, "eval_windows": 2}
    spec = TrialSpec(
        "byte_lm", (attention,), train_len=16 * 9, train_steps=12, num_heads=2, head_dim=8, dtype="float64",
        task_params=params,
    )  # fmt: skip
    cut_at: list[float] = []

    def cut_the_link(step: int, loss: float) -> None:
        if step == 4 and not cut_at:
            subprocess.run(cut, check=True)
            cut_at.append(time.time())

    alone = Member(spec, "cpu", MemberSettings())
    alone.join(Seat(1, 0, 1, "127.0.0.1", 0))
    alone.train(spec.train_steps)
    with TrainingCoordinator(
        spec, Share(1), world_size=3, wait_s=120.0, replace_s=0.5, tell=cut_the_link, say=lambda text: None
    ) as coordinator:
        result = coordinator.run(stretch=4, evaluate=False)
        weights = coordinator.weights()
    off = max(
        float((own - wanted).abs().max() / wanted.abs().max())
        for own, wanted in zip(weights, alone.weights(), strict=True)
    )
    recoveries = [
        {
            "noticed_in_s": recovery.noticed_at - cut_at[0],
            "resumed_at_s": recovery.resumed_at - cut_at[0],
            "world_size": recovery.world_size,
            "steps_lost": recovery.steps_lost,
            "why": [why for _, why in recovery.lost],
        }
        for recovery in result.recoveries
    ]
    print(json.dumps({"recoveries": recoveries, "relative_error": off}))
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
