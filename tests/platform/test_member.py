"""A member leaves whatever it waits for when its generation is cancelled, also before it has a group."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from raybsa.cluster.member import Member, MemberSettings
from raybsa.cluster.membership import Seat
from raybsa.comm import Cancelled
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every must be a positive integer, got 0"),
        ({"timeout_s": 0.0}, "timeout_s positive, got 0 and 0.0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0 .*, got -1 and 60.0"),
    ],
)
def test_settings_that_no_member_can_keep_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemberSettings(**settings)


@pytest.mark.parametrize("announced", [False, True], ids=["before", "after"])
def test_a_peer_that_is_lost_before_or_after_it_announced_itself(tmp_path: Path, announced: bool) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 60)
    attention = AttentionSpec("distributed", PatternSpec("bigbird"), 0.5, 16)
    params = {"text": str(tmp_path), "train_batch": 2, "eval_windows": 2}
    spec = TrialSpec("byte_lm", (attention,), train_len=64, num_heads=2, head_dim=8, task_params=params)
    member = Member(spec, "cpu", MemberSettings(timeout_s=20.0))
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    if announced:
        dist.PrefixStore("generation-1/", store).set("here-1", "1")
    cancelled_at = []

    def cancel() -> None:
        cancelled_at.append(time.monotonic())
        member.cancel(1, "a test")

    threading.Timer(0.5, cancel).start()
    with pytest.raises(Cancelled, match="generation 1: a test"):
        member.join(Seat(1, 0, 2, "127.0.0.1", store.port))
    assert time.monotonic() - cancelled_at[0] < 10.0, "who was cancelled must not wait for its peer"
