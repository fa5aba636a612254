"""What the platform's tests share."""

import pytest

from raybsa.results.record import Record


@pytest.fixture
def record():
    """Makes a whole Record; keywords replace fields."""

    def make(trial_id: str = "run-000", **changes) -> Record:
        values = {
            "trial_id": trial_id, "run_id": "run", "job": "test", "created_at": "2025-01-01T00:00:00+00:00",
            "status": "ok", "error": None, "spec": "{}", "spec_hash": "0", "seed": 0, "task": "speed",
            "variant": "base", "pattern": "dense", "block_size": 64, "density": 0.25, "seq_len": 128, "train_len": None,
            "batch": 1, "num_heads": 2, "head_dim": 8, "causal": True, "dtype": "float32", "backend": "auto",
        }  # fmt: skip
        return Record(**{**values, **changes})

    return make
