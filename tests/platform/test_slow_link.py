"""A link between two hosts of this machine lets through what it is told to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raybsa.experiments.hosts import run_words
from raybsa.experiments.slow_link import over_links
from raybsa.experiments.suites import COMPRESSION, compression


def test_a_training_over_a_slow_link_takes_at_least_what_its_bytes_take() -> None:
    spec = compression(replace(COMPRESSION, train_len=16, train_steps=4, head_dim=16, task_params={}), seeds=1)[0]
    try:
        (found,) = over_links([spec], [20])
    except OSError as error:
        pytest.skip(f"hosts of one's own cannot be had here: {error}")
    assert found.sent_bytes > 100_000
    assert found.step_ms >= 8e-3 * (found.sent_bytes - 64_000) / 20, "all but the first burst travels at 20 Mbit/s"


def test_a_command_that_fails_says_so() -> None:
    with pytest.raises(OSError, match=r"^ls --no-such-option: .*"):
        run_words("ls", "--no-such-option")
