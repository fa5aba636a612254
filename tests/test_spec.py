"""Specs: plain data that goes to JSON and back, hashes stably and refuses nonsense."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from raybsa.spec import DENSITY_MEANING, AttentionSpec, PatternSpec, Ranks, TrialSpec, canonical_json

WINDOW = PatternSpec("sliding_window", {"window": 64})
SPARSE = AttentionSpec("base", WINDOW, density=0.25, block_size=32)
TRIAL = TrialSpec("byte_lm", (SPARSE, AttentionSpec("dense")), task_params={"text": "/a", "sizes": (1, 2)})


@pytest.mark.parametrize("spec", [WINDOW, SPARSE, AttentionSpec("dense"), TRIAL], ids=lambda s: type(s).__name__)
def test_a_spec_survives_json(spec):
    assert type(spec).from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_equal_specs_have_equal_hashes_and_digests():
    again = TrialSpec.from_dict(TRIAL.to_dict())
    assert (hash(again), again.digest) == (hash(TRIAL), TRIAL.digest)


def test_whole_densities_are_the_same_question_as_int_and_float():
    assert AttentionSpec("base", WINDOW, density=1).to_dict() == AttentionSpec("base", WINDOW, density=1.0).to_dict()
    with_int, with_float = (replace(TRIAL, learning_rate=rate) for rate in (1, 1.0))
    assert with_int.digest == with_float.digest


def test_any_change_changes_the_digest():
    changes = {"task": "recall", "seq_len": 4096, "seed": 1, "causal": False, "attention": (SPARSE,)}
    digests = {replace(TRIAL, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {TRIAL.digest}) == len(changes) + 1


def test_the_digest_is_the_same_in_another_process():
    code = f"from raybsa.spec import *; print(TrialSpec.from_dict({TRIAL.to_dict()!r}).digest)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == TRIAL.digest


def test_params_are_copied_so_that_a_spec_cannot_change():
    params = {"window": 1, "parts": [1]}
    spec = PatternSpec("x", params)
    params["parts"].append(2)
    spec.to_dict()["params"]["parts"].append(3)
    assert spec.params["parts"] == [1]


def test_one_attention_serves_every_layer_or_each_has_its_own():
    assert [TRIAL.layer(i).variant for i in range(2)] == ["base", "dense"]
    shared = TrialSpec("speed", (SPARSE,), num_layers=3)
    assert {shared.layer(i) for i in range(3)} == {SPARSE}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": -1}, "learning_rate must be a positive number, got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number, got nan"),
        ({"seq_len": 0}, "seq_len must be a positive integer, got 0"),
        ({"batch": 2.0}, "batch must be a positive integer, got 2.0"),
        ({"train_steps": True}, "train_steps must be a positive integer, got True"),
        ({"num_heads": 4, "num_kv_heads": 3}, "multiple of num_kv_heads, got 4 and 3"),
        ({"dtype": "int8"}, "dtype must be one of .*, got 'int8'"),
        ({"attention": (SPARSE,) * 3}, r"one a layer \(2\), got 3"),
        ({"attention": ()}, r"one a layer \(2\), got 0"),
    ],
)
def test_a_trial_refuses_nonsense(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TRIAL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.0}, r"density must lie in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"density must lie in \(0, 1\], got 1.5"),
        ({"block_size": 48}, "block_size must be a power of two, got 48"),
        ({"block_size": -16}, "block_size must be a positive integer, got -16"),
        ({"pattern": None}, "variant 'base' needs a PatternSpec, got None"),
        ({"variant": "dense"}, "the dense baseline takes no pattern"),
    ],
)
def test_an_attention_refuses_nonsense(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SPARSE, **change)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrialSpec.from_dict({**TRIAL.to_dict(), "speed": 1}), r"got also \['speed'\]"),
        (lambda: TrialSpec.from_dict({"task": "speed"}), r"names its 'attention', got \['task'\]"),
        (lambda: PatternSpec.from_dict({"params": {}}), r"keys 'name' and 'params', got \{'params': \{\}\}"),
        (lambda: PatternSpec(""), "non-empty string, got ''"),
    ],
    ids=["unknown key", "no attention", "no name", "empty name"],
)
def test_dicts_with_wrong_keys_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError):
        PatternSpec("x", {"f": object()})
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("nan"))


def test_a_ring_shares_a_question_that_is_otherwise_the_same():
    asked = replace(TRIAL, task="byte_lm", attention=(SPARSE,))
    ranks = Ranks(2, "zigzag", {"name": "int8"}, {"name": "powersgd"})
    ring = asked.over(ranks)
    assert TrialSpec.from_dict(ring.to_dict()).ranks == ranks
    assert ring.digest != asked.digest
    assert ring.alone == asked == asked.over(Ranks())
    assert ring.factory_arguments(0)["distributed_config"] == {
        "partition": "zigzag",
        "gradient_codec": {"name": "int8"},
    }
    assert "distributed_config" not in asked.factory_arguments(0)
    assert (ranks.label, Ranks().label) == ("2 ranks, zigzag, powersgd, int8", "")
    other = replace(TRIAL, task="compression", task_params={"world_size": 4})
    assert (other.ranks, other.alone) == (Ranks(), other), "its ranks are no ring"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"world_size": "2"}, "world_size must be a positive integer, got '2'"),
        ({"world_size": 2, "codec": "int8"}, "codecs as specs, with a 'name', got 'int8'"),
    ],
)
def test_ranks_that_are_none_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        replace(TRIAL, task_params=params)


def test_what_a_density_means_is_part_of_the_question_and_an_earlier_meaning_can_be_read():
    asked = TrialSpec("byte_lm", (AttentionSpec("base", PatternSpec("strided"), 0.1),))
    data = asked.to_dict()
    assert data.pop("density_meaning") == DENSITY_MEANING
    earlier = TrialSpec.from_dict(data)
    assert (earlier.is_current, asked.is_current) == (False, True)
    assert earlier.to_dict() == data, "its hash is that of its row"
    assert earlier != asked
    assert earlier.digest != asked.digest
    plain = replace(asked, attention=(AttentionSpec("dense"),))
    assert TrialSpec.from_dict(plain.to_dict()) == plain
    assert "density_meaning" not in plain.to_dict(), "without a density there is one meaning"
