"""The search space: only questions that can be asked, the baseline first, every family once."""

from dataclasses import replace

import optuna
import pytest

from raybsa import patterns
from raybsa.experiments.presets import PRESETS
from raybsa.experiments.space import DEFAULT_FAMILIES, SearchSpace
from raybsa.patterns.blocks import save_blocks
from raybsa.spec import AttentionSpec, TrialSpec

BASE = TrialSpec("byte_lm", (AttentionSpec("dense"),), seq_len=512, train_len=256)
SPACE = SearchSpace(BASE)


def drawn(space, count, seed=0):
    """What Optuna draws from ``space``, each trial told the same value."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    configs = []
    for _ in range(count):
        trial = study.ask()
        configs.append(space.suggest(trial) or trial.params)
        study.tell(trial, 1.0)
    return configs


def test_the_first_question_is_the_dense_baseline_and_no_other_is():
    configs = drawn(SPACE, 30)
    assert SPACE.spec(configs[0]) == replace(BASE, attention=(AttentionSpec("dense"),))
    assert all(config["family"] != "dense" for config in configs[1:])


def test_every_drawn_question_has_a_layout_at_both_lengths_within_the_densities():
    for config in drawn(SPACE, 40)[1:]:
        spec = SPACE.spec(config)
        (attention,) = spec.attention
        assert 0.05 <= attention.density <= 0.5
        assert attention.block_size in (16, 32, 64)
        for length in (spec.seq_len, spec.train_len):
            layout = patterns.build(attention.pattern).layout(
                length, num_heads=4, q_block_size=attention.block_size, causal=True, density=attention.density
            )
            assert layout.nnz_blocks >= layout.num_q_blocks


def test_the_first_points_name_the_baseline_and_every_family_once():
    points = SPACE.first_points()
    assert [point["family"] for point in points] == ["dense", *DEFAULT_FAMILIES]
    assert len({SPACE.spec(point).digest for point in points}) == len(points)


def test_parameters_come_back_as_they_were_given():
    space = SearchSpace(BASE, {"dilated": {"dilation_rates": [[1, 2, 4]]}, "bigbird": {"num_globals": [2]}})
    params = {dict(space.spec(p).attention[0].pattern.to_dict())["name"]: p for p in space.first_points()[1:]}
    assert space.spec(params["dilated"]).attention[0].pattern.params == {"dilation_rates": [1, 2, 4]}
    assert space.spec(params["bigbird"]).attention[0].pattern.params == {"num_globals": 2}


def test_a_learned_pattern_and_a_frozen_one_can_be_searched(tmp_path):
    layout = patterns.build("random").layout(512, num_heads=4, q_block_size=32, causal=True, density=0.2)
    frozen = save_blocks(layout, tmp_path / "frozen.parquet").spec
    families = {"adaptive": {"method": ["bias"]}, "blocks": {"path": [frozen.params["path"]]}}
    space = SearchSpace(BASE, families, block_sizes=(32,))
    learned, fixed = (space.spec(point).layer(0) for point in space.first_points()[1:])
    assert (learned.variant, learned.pattern.params) == ("adaptive", {"method": "bias"})
    assert (fixed.variant, fixed.pattern) == ("base", frozen)
    with pytest.raises(ValueError, match="method must be one of"):
        SearchSpace(BASE, {"adaptive": {"method": ["magic"]}})


def test_equal_seeds_ask_equal_questions():
    assert drawn(SPACE, 12, seed=5) == drawn(SPACE, 12, seed=5) != drawn(SPACE, 12, seed=6)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_trials_enough_for_its_first_points(name):
    preset = PRESETS[name]
    assert preset.trials >= len(preset.space.first_points())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"densities": (0.0, 0.5)}, r"0 < lowest <= highest <= 1, got \(0.0, 0.5\)"),
        ({"densities": (0.5, 0.1)}, "0 < lowest <= highest <= 1"),
        ({"families": {}}, "needs families and block sizes"),
        ({"families": {"spiral": {}}}, "unknown pattern 'spiral'"),
        ({"families": {"strided": {"width": [1]}}}, "strided has no parameter width"),
        ({"block_sizes": (24,)}, "block_size must be a power of two, got 24"),
    ],
)
def test_a_space_refuses_what_cannot_be_asked(change, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace(BASE, **change)
