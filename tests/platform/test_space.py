"""The search space: only questions that can be asked, the baseline first, every family once."""

from contextlib import suppress
from dataclasses import replace

import optuna
import pytest

from raybsa import patterns
from raybsa.experiments.layers import asked_density
from raybsa.experiments.presets import PRESETS
from raybsa.experiments.space import DEFAULT_FAMILIES, SearchSpace
from raybsa.experiments.spaces import SPACES, make_space
from raybsa.experiments.validity import (
    DIAGONAL,
    MISFIT,
    NO_RULE,
    REPEATED,
    TOO_MANY_RANKS,
    TOO_SHORT,
    UNREACHED,
    UNSPLIT,
    Rejections,
)
from raybsa.patterns.blocks import save_blocks
from raybsa.spec import AttentionSpec, PatternSpec, Ranks, TrialSpec, canonical_json

BASE = TrialSpec("byte_lm", (AttentionSpec("dense"),), seq_len=512, train_len=256)
SPACE = SearchSpace(BASE)
POWERSGD = {"name": "powersgd", "params": {"rank": 2}}
RINGS = SearchSpace(
    BASE,
    {"random": {}, "strided": {"stride": [2, 4]}},
    variants=("base", "distributed"),
    world_sizes=(1, 2, 4),
    partitions=("balanced", "zigzag"),
    codecs=("none", "int8", POWERSGD),
)


def drawn(space, count, seed=0):
    """What Optuna draws from ``space``, each trial told the same value."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    configs = []
    for _ in range(count):
        trial = study.ask()
        configs.append(space.draw(trial))
        assert trial.params == configs[-1]
        study.tell(trial, 1.0)
    return configs


@pytest.mark.parametrize("name", SPACES)
def test_a_question_names_its_configuration_and_back(name):
    space = make_space(name, BASE)
    configs = [*drawn(space, 40), *space.first_points(), *space.grid(2)]
    asked = []
    for config in configs:
        with suppress(ValueError):  # a mixture that leaves a rule without heads
            asked.append((config, space.spec(config)))
    assert len(asked) > 40
    assert all(space.spec(space.config(spec)) == spec for _, spec in asked)
    assert all(
        space.distributions(config).keys() == config.keys() for config, _ in asked if config != {"family": "dense"}
    )


def test_a_question_of_another_search_has_no_configuration():
    spec = SPACE.spec(SPACE.first_points()[1])
    attention = spec.attention[0]
    others = [
        replace(spec, seq_len=1024),
        replace(spec, attention=(replace(attention, density=0.9),)),
        replace(spec, attention=(replace(attention, block_size=128),)),
        replace(spec, attention=(replace(attention, pattern=PatternSpec("document", {"lengths": [64]})),)),
        replace(spec, attention=(replace(attention, pattern=PatternSpec("sink_window", {"sink": 5})),)),
    ]
    assert SPACE.config(spec) == SPACE.first_points()[1]
    assert [SPACE.config(other) for other in others] == [None] * len(others)


def test_a_mixture_gives_its_first_rule_a_share_of_the_heads():
    space = SearchSpace(BASE, {"strided": {}, "random": {}}, mixtures=(("strided", "random"),), shares=(0.25, 0.1))
    config = {"family": "per_head", "density": 0.2, "block_size": 16, "mixture": "strided+random", "share": 0.25}
    spec = space.spec(config)
    assert [part["name"] for part in spec.attention[0].pattern.params["parts"]] == ["strided"] + ["random"] * 3
    assert space.config(spec) == config
    with pytest.raises(ValueError, match=r"a share of 0.1 of 4 heads leaves a rule without heads"):
        space.spec({**config, "share": 0.1})


def test_the_grid_has_every_combination_once_the_baseline_first():
    space = SearchSpace(BASE, {"strided": {"stride": [2, 4]}, "random": {}}, mixtures=(("strided", "random"),))
    configs = list(space.grid(4))
    assert configs[0] == {"family": "dense"}
    # densities x block sizes x (parameters), and for the mixture times the shares
    assert len(configs) == 1 + 4 * 3 * (2 + 1) + 4 * 3 * 3 * 2
    assert len({canonical_json(config) for config in configs}) == len(configs)


# ---- ranks ---------------------------------------------------------------------------------------------------------


def test_how_ranks_share_a_question_is_asked_only_where_there_are_ranks():
    configs = [*drawn(RINGS, 60), *RINGS.openings(), *RINGS.grid(2)]
    for config in configs:
        alone, fixed = config.get("world_size") == 1, "density" not in config
        assert ("variant" in config) == (alone and not fixed)
        assert {"partition", "codec"} & set(config) == (set() if alone or fixed else {"partition", "codec"})
        found = RINGS.config(RINGS.spec(config))
        assert RINGS.spec(found) == RINGS.spec(config)
        assert found.keys() == config.keys()
        assert fixed or RINGS.distributions(config).keys() == config.keys()
    assert {RINGS.spec(config).ranks.world_size for config in configs} == {1, 2, 4}


def test_a_question_of_a_ring_says_all_that_its_ranks_must_know():
    config = {"family": "random", "density": 0.2, "block_size": 16, "world_size": 2, "partition": "zigzag"}
    small, factors = ({**config, "codec": RINGS.choices("codec")[index]} for index in (1, 2))
    spec = RINGS.spec(small)
    assert spec.attention[0].variant == "distributed"
    assert (spec.ranks.world_size, spec.ranks.partition) == (2, "zigzag")
    assert spec.ranks.codec == spec.ranks.gradient_codec
    assert spec.ranks.codec["name"] == "int8"
    assert spec.ranks.label == "2 ranks, zigzag, int8"
    ranks = RINGS.spec(factors).ranks
    assert (ranks.codec["name"], ranks.gradient_codec["name"]) == ("powersgd", "none"), "dK and dV go from rank to rank"
    assert spec.alone == replace(RINGS.base, attention=spec.attention)
    timed = replace(RINGS, base=replace(BASE, task="speed"))
    assert timed.spec(small).ranks.codec["name"] == "none", "nothing is trained"
    assert timed.config(timed.spec(small)) == small


def test_ranks_with_one_choice_are_not_asked_for_and_without_ranks_a_question_is_what_it_was():
    only = replace(RINGS, world_sizes=(2,), partitions=("striped",), codecs=("none",))
    config = {"family": "random", "density": 0.2, "block_size": 16}
    assert only.spec(config).ranks == Ranks(
        2, "striped", {"name": "none", "params": {}}, {"name": "none", "params": {}}
    )
    assert only.config(only.spec(config)) == config
    alone = {**config, "world_size": 1, "variant": "base"}
    assert RINGS.spec(alone).digest == SearchSpace(BASE, {"random": {}}).spec(config).digest


def test_every_choice_of_ranks_is_among_the_openings():
    asked = [RINGS.spec(config).ranks for config in RINGS.openings()]
    assert {ranks.world_size for ranks in asked} == {1, 2, 4}
    assert {ranks.partition for ranks in asked if ranks.world_size > 1} == {"balanced", "zigzag"}
    assert {ranks.codec["name"] for ranks in asked if ranks.world_size > 1} == {"none", "int8", "powersgd"}
    assert all(RINGS.spec(config).ranks.world_size == 1 for config in RINGS.fixed_points())


def test_rings_that_cannot_be_are_rejected_and_counted():
    base = replace(BASE, dtype="float64")
    learned = {"method": ["compressed", "distill"]}
    space = replace(RINGS, base=base, families={"random": {}, "adaptive": learned}, world_sizes=(1, 2, 5))
    rejections = Rejections(space)
    config = {"family": "random", "density": 0.5, "block_size": 64, "world_size": 2, "partition": "balanced"}
    config["codec"] = space.choices("codec")[0]
    assert rejections.admit(config)
    assert rejections.admit({**config, "world_size": 5}) is None, "256 tokens are four blocks"
    assert rejections.admit({**config, "codec": space.choices("codec")[1]}) is None, "int8 takes no float64"
    assert rejections.admit({**config, "family": "adaptive", "adaptive.method": '"compressed"'}) is None
    assert rejections.admit({**config, "family": "adaptive", "adaptive.method": '"distill"'})
    assert rejections.admit({**config, "partition": "zigzag"}), "another partition is another question"
    assert rejections.admit(config) is None
    assert rejections.counts == {TOO_MANY_RANKS: 1, MISFIT: 1, UNSPLIT: 1, REPEATED: 1}


# ---- layers that differ --------------------------------------------------------------------------------------------


def layered(**changes):
    families = {"strided": {"stride": [2, 4]}, "random": {}}
    return SearchSpace(BASE, families, (0.1, 0.4), (16, 32), per_layer=True, **changes)


IN_TURN = {"family": "per_layer", "density": 0.2, "block_size": 16, "strided.stride": "4"}


def test_each_layer_follows_its_own_family_or_stays_dense():
    spec = layered().spec({**IN_TURN, "layer1": "strided", "layer0": "dense"})
    assert spec.attention == (
        AttentionSpec("dense", block_size=16),
        AttentionSpec("base", PatternSpec("strided", {"stride": 4}), 0.2, 16),
    )
    assert layered().config(spec) == {**IN_TURN, "layer0": "dense", "layer1": "strided"}
    assert SearchSpace(BASE, {"strided": {"stride": [2, 4]}}, block_sizes=(16,)).config(spec) is None
    assert layered().config(replace(spec, attention=spec.attention * 2, num_layers=4)) is None


@pytest.mark.parametrize("variants", [("base",), ("base", "distributed")], ids=["one variant", "two"])
def test_a_question_whose_layers_differ_names_its_configuration_and_back(variants):
    space = layered(variants=variants)
    differ = [spec for config in drawn(space, 60) if len((spec := space.spec(config)).attention) > 1]
    assert len(differ) > 9
    assert all(space.spec(space.config(spec)) == spec for spec in differ)
    assert len({layer.block_size for layer in differ[0].attention}) == 1


def test_the_last_opening_lets_the_layers_take_turns_and_the_grid_has_all_ways_once():
    space = layered()
    assert space.first_points() == replace(space, per_layer=False).first_points()
    turns = space.spec(space.openings()[-1])
    assert [layer.pattern.name for layer in turns.attention] == ["strided", "random"]
    asked = [space.spec(config) for config in space.grid(1)]
    assert sum(len(spec.attention) == 2 for spec in asked) == 2 * (2 * 4 + 2), "block sizes x (with strided, without)"
    with pytest.raises(ValueError, match="at most 4096 ways to give layers their families, got 6561"):
        list(replace(space, base=replace(BASE, num_layers=8)).grid())


def test_layers_that_do_not_differ_are_the_question_of_all_alike():
    space, rejections = layered(), Rejections(layered())
    alike = {**IN_TURN, "layer0": "random", "layer1": "random"}
    del alike["strided.stride"]
    assert rejections.admit({"family": "dense"})
    assert rejections.admit({"family": "random", "density": 0.2, "block_size": 16})
    assert rejections.admit(alike) is None
    assert rejections.admit({**alike, "layer0": "dense", "layer1": "dense"}) is None
    assert rejections.admit({**alike, "layer1": "dense"}) == space.spec({**alike, "layer1": "dense"})
    assert rejections.admit({**alike, "layer1": "dense", "density": 0.05}) is None
    assert rejections.counts == {REPEATED: 2, DIAGONAL: 1}


def test_the_density_of_a_stratum_counts_dense_layers():
    config = {**IN_TURN, "layer0": "dense", "layer1": "strided"}
    assert (asked_density(config), asked_density({**IN_TURN, "family": "strided"})) == (0.6, 0.2)
    assert asked_density({"family": "dense"}) is None


# ---- both ----------------------------------------------------------------------------------------------------------


def test_layers_that_differ_share_their_ranks_and_one_that_stays_dense_keeps_all_blocks():
    space = replace(RINGS, per_layer=True)
    config = {"family": "per_layer", "layer0": "dense", "layer1": "random", "density": 0.2, "block_size": 16}
    config |= {"world_size": 2, "partition": "zigzag", "codec": space.choices("codec")[1]}
    spec = space.spec(config)
    assert spec.attention == (
        AttentionSpec("distributed", PatternSpec("dense"), block_size=16),
        AttentionSpec("distributed", PatternSpec("random"), 0.2, 16),
    )
    assert spec.ranks.label == "2 ranks, zigzag, int8"
    assert space.config(spec) == config
    assert Rejections(space).admit(config) == spec
    both = [c for c in [*drawn(space, 60), *space.openings()] if c["family"] == "per_layer"]
    assert {space.spec(c).ranks.world_size for c in both} == {1, 2, 4}
    assert all(space.spec(space.config(space.spec(c))) == space.spec(c) for c in both)


def test_layers_that_all_stay_dense_are_the_baseline_of_one_worker():
    space = replace(RINGS, per_layer=True, world_sizes=(2,))
    rejections = Rejections(space)
    assert rejections.admit({"family": "dense"})
    config = {"family": "per_layer", "layer0": "dense", "layer1": "dense", "density": 0.2, "block_size": 16}
    config |= {"partition": "zigzag", "codec": space.choices("codec")[0]}
    assert space.spec(config) == space.spec({"family": "dense"})
    assert rejections.admit(config) is None
    assert rejections.counts == {REPEATED: 1}


def test_one_layer_that_ranks_cannot_share_is_enough():
    learned = {"random": {}, "adaptive": {"method": ["compressed", "bias"]}}
    space = replace(RINGS, families=learned, per_layer=True)
    config = {"family": "per_layer", "layer0": "random", "layer1": "adaptive", "density": 0.2, "block_size": 16}
    config |= {"world_size": 2, "partition": "zigzag", "codec": space.choices("codec")[0]}
    rejections = Rejections(space)
    assert rejections.admit({**config, "adaptive.method": '"compressed"'}) is None
    assert rejections.admit({**config, "adaptive.method": '"bias"'})
    assert rejections.counts == {UNSPLIT: 1}


# ---- what is rejected before it starts -----------------------------------------------------------------------------


def test_questions_that_say_nothing_are_rejected_and_counted():
    space = SearchSpace(
        BASE,
        {"strided": {}, "random": {}, "fixed": {"span": [2], "summary": [1]}},
        densities=(0.03, 1.0),
        block_sizes=(16, 256),
        mixtures=(("strided", "random"),),
        shares=(0.1,),
    )
    rejections = Rejections(space)
    config = {"family": "strided", "density": 0.5, "block_size": 16}
    assert rejections.admit(config) == space.spec(config)
    assert rejections.admit({**config, "block_size": 256}) is None
    assert rejections.admit({**config, "density": 0.03}) is None
    assert rejections.admit({**config, "family": "per_head", "mixture": "strided+random", "share": 0.1}) is None
    assert rejections.admit({**config, "density": 0.5004}) is None, "three digits count"
    whole = {**config, "density": 1.0}
    assert rejections.admit(whole)
    fixed = {**whole, "family": "fixed", "fixed.span": "2", "fixed.summary": "1"}
    assert rejections.admit(fixed) is None, "all blocks are all blocks"
    assert rejections.counts == {TOO_SHORT: 1, DIAGONAL: 1, NO_RULE: 1, REPEATED: 2}
    assert str(rejections).startswith("5 rejected before they started: 2 (the blocks of an earlier question), ")


def test_what_was_asked_in_an_earlier_run_is_not_asked_again():
    rejections = Rejections(SPACE)
    config = SPACE.first_points()[1]
    rejections.remember(SPACE.spec(config))
    assert rejections.admit(config) is None
    assert rejections.counts == {REPEATED: 1}


# ---- as data -------------------------------------------------------------------------------------------------------


def test_a_space_from_a_file_is_the_space_as_an_object(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(
        "families:\n  dilated: {dilation_rates: [[1, 2, 4], [1, 4, 16]]}\n  random:\n"
        "densities: [0.1, 0.4]\nblock_sizes: [16]\nmixtures: [[dilated, random]]\nshares: [0.5]\nper_layer: true\n"
    )
    wanted = SearchSpace(
        BASE,
        {"dilated": {"dilation_rates": [[1, 2, 4], [1, 4, 16]]}, "random": {}},
        (0.1, 0.4),
        (16,),
        (("dilated", "random"),),
        (0.5,),
        per_layer=True,
    )
    assert make_space(str(path), BASE) == wanted


def test_ranks_come_from_a_file_too(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(
        "families: {random: , strided: {stride: [2, 4]}}\nvariants: [base, distributed]\nworld_sizes: [1, 2, 4]\n"
        "partitions: [balanced, zigzag]\ncodecs: [none, int8, {name: powersgd, params: {rank: 2}}]\n"
    )
    assert make_space(str(path), BASE) == RINGS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour: red", r"a space has the keys .*'mixtures'.*, got \['colour'\]"),
        ("families: {spiral: {}}", "unknown pattern 'spiral'"),
        ("- 1", "a space has the keys"),
        ("families: [", "cannot be used"),
        ("mixtures: [[random, random]]", "a mixture is a pair"),
        ("world_sizes: [0]", r"world_sizes are numbers of ranks from 1, got \[0\]"),
        ("world_sizes: [two]", r"world_sizes are numbers of ranks from 1, got \['two'\]"),
        ("partitions: [heap]", r"partitions of balanced, contiguous, zigzag, striped, got .* and \['heap'\]"),
        ("codecs: [zip]", "unknown codec 'zip'"),
        ("per_layer: sometimes", "per_layer is true or false, got 'sometimes'"),
        ("1: 2\ncolour: red", r"a space has the keys .*, got \['1', 'colour'\]"),
        ("densities: [0.1]", r"densities are a pair of numbers, .*, got \[0.1\]"),
        ("densities: 0.1", r"densities are a pair of numbers, .*, got 0.1"),
        ("densities: [a, 0.2]", r"densities are a pair of numbers, .*, got \['a', 0.2\]"),
        ("families: 3", "families map a name to its parameters .*, got 3"),
        ("families: [bigbird]", r"families map a name to its parameters .*, got \['bigbird'\]"),
        ("families: {bigbird: 3}", r"families map a name to its parameters .*, got \{'bigbird': 3\}"),
        ("families: {sliding_window: {window: [256, 512]}}", "a density sets window of sliding_window"),
        ("families: {bigbird: {num_globals: 3}}", "num_globals of bigbird has a list of choices, got 3"),
        ("mixtures: 3", "mixtures is a list, got 3"),
        ("mixtures: [random]", "a mixture is a pair of .*, got 'random'"),
        ("mixtures: [[random, 3]]", r"a mixture is a pair of .*, got \['random', 3\]"),
        ("shares: [half]", r"a share of the heads lies between 0 and 1, got \['half'\]"),
        ("block_sizes: 32", "block_sizes is a list, got 32"),
        ("partitions: balanced", "partitions is a list, got 'balanced'"),
        ("references: [3]", "AttentionSpec is a mapping of .*, got 3"),
        ("references: [{pattern: bigbird}]", "a pattern dict has the keys 'name' and 'params', got 'bigbird'"),
    ],
)
def test_a_file_that_describes_no_space_says_why(tmp_path, text, message):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        make_space(str(path), BASE)


def test_an_unknown_space_names_those_that_there_are():
    with pytest.raises(
        ValueError, match="one of quick, demo, families, window-family, long-context, everything or a YAML"
    ):
        make_space("no-such", BASE)


def test_every_admitted_question_has_a_layout_at_both_lengths_within_the_densities():
    rejections = Rejections(SPACE)
    admitted = [spec for spec in map(rejections.admit, drawn(SPACE, 60)) if spec is not None]
    assert rejections.counts[UNREACHED]
    assert len(admitted) > 10
    for spec in admitted:
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


def test_the_openings_go_on_with_every_other_choice_once():
    space = SearchSpace(BASE, {"random": {}, "bigbird": {"num_globals": [1, 2], "seed": [1, 2, 3]}})
    first, openings = space.first_points(), space.openings()
    assert openings[: len(first)] == first
    asked = [space.spec(point).attention[0].pattern.params for point in openings[len(first) :]]
    assert asked == [{"num_globals": g, "seed": r} for g, r in ((2, 1), (1, 2), (1, 3))]


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
    rejections = Rejections(space)
    asked = space.first_points()[1] | {"density": 0.4}
    assert [rejections.admit(asked) is None for _ in range(2)] == [False, True], "asked, but once"
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
        ({"densities": (0.0, 0.5)}, r"0 < lowest <= highest <= 1, got \[0.0, 0.5\]"),
        ({"densities": (0.5, 0.1)}, "0 < lowest <= highest <= 1"),
        ({"families": {}}, "needs families and block sizes"),
        ({"families": {"spiral": {}}}, "unknown pattern 'spiral'"),
        ({"families": {"strided": {"width": [1]}}}, "strided has no parameter width"),
        ({"block_sizes": (24,)}, "block_size must be a power of two, got 24"),
        ({"mixtures": (("random", "spiral"),)}, r"a mixture is a pair of .*, got \['random', 'spiral'\]"),
        ({"base": replace(BASE, task="recall"), "world_sizes": (1, 2)}, r"only the tasks byte_lm, speed can be split"),
        ({"base": replace(BASE, task="module"), "world_sizes": (1, 2)}, r"split over ranks, .* with task 'module'"),
        ({"base": replace(BASE, num_layers=1), "per_layer": True}, "per_layer needs at least two layers"),
        ({"shares": (1.0,)}, r"a share of the heads lies between 0 and 1, got \[1.0\]"),
    ],
)
def test_a_space_refuses_what_cannot_be_asked(change, message):
    with pytest.raises(ValueError, match=message):
        SearchSpace(**({"base": BASE} | change))


def test_a_variant_that_nobody_makes_is_named_before_anything_is_asked():
    with pytest.raises(
        ValueError, match=r"a space's variants are of \['base', 'multihead', 'distributed'\], got \['bsae'\]"
    ):
        SearchSpace(BASE, variants=("base", "bsae"))
