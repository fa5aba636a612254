"""What a search asks next: budgets, histories, bounds, early stopping and the free rung, without Ray's cluster."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray.tune.schedulers import TrialScheduler

from raybsa.comm import Communicator
from raybsa.experiments import landscape
from raybsa.experiments.advantage import advantage
from raybsa.experiments.algorithms import ALGORITHMS
from raybsa.experiments.costs import ENOUGH, CostModel
from raybsa.experiments.dry_run import dry_run
from raybsa.experiments.forecast import sizes_of
from raybsa.experiments.front import front_objectives, left_out, read_best, write_front
from raybsa.experiments.history import history
from raybsa.experiments.questions import Questions
from raybsa.experiments.recording import Run, record_of
from raybsa.experiments.screen import DOMINATED, OUT_OF_BOUNDS, Screen
from raybsa.experiments.search import Plan
from raybsa.experiments.space import SearchSpace
from raybsa.experiments.spaces import PAPERS, space_of
from raybsa.experiments.strata import QUALITY, STEPS, StratifiedHalving, stratum
from raybsa.results.pareto import LATENCY, named_objectives, pareto_front, quality_objective
from raybsa.results.record import Measurement, Outcome, SeriesPoint
from raybsa.results.store import Store
from raybsa.ring.cost import predict
from raybsa.ring.work import work_of
from raybsa.spec import AttentionSpec, PatternSpec, Ranks, TrialSpec
from raybsa.tasks.ring_rank import LINK
from raybsa.tasks.sharded_trial import plans_of
from raybsa.variants.distributed import share_partition
from raybsa.variants.factory import create_block_sparse_attention

BASE = TrialSpec("byte_lm", (AttentionSpec("dense"),), seq_len=512, train_len=256, train_steps=90)
SPACE = SearchSpace(BASE, {"sliding_window": {}, "random": {}, "strided": {"stride": [2, 4]}}, block_sizes=(8, 16))
GOALS = (quality_objective("min"), LATENCY)
PAIR_MS = 0.01
RINGS = replace(SPACE, world_sizes=(1, 2), codecs=("none", "int8"))
RING = {"family": "random", "density": 0.2, "block_size": 8, "world_size": 2, "codec": RINGS.choices("codec")[0]}


def milliseconds(spec):
    """A machine whose every pair of blocks takes its time, backward twice forward's."""
    attention = spec.attention[0]
    blocks = spec.seq_len // attention.block_size
    pairs = (attention.density or 1.0) * blocks * (blocks + 1) / 2
    return PAIR_MS * pairs * (attention.block_size / 16) ** 2 * spec.num_layers


def answer(spec, number, quality=2.0, **changes):
    forward = milliseconds(spec)
    measured = {
        "density": spec.attention[0].density or 1.0,
        "forward_ms_p50": forward,
        "forward_backward_ms_p50": 3 * forward,
        "peak_bytes": 1000,
        "quality_name": "bits_per_byte",
        "quality_goal": "min",
        "quality": quality,
        "train_seconds": 9.0,
        "trained_steps": 90,
        "device_name": "machine",
        "num_threads": 1,
    }
    outcome = Outcome(spec, Measurement(**(measured | changes)), None, 0)
    return record_of(outcome, Run("run", "test"), f"run-{number:03d}")


def answers(count=9, algorithm="random"):
    questions = Questions(SPACE, ALGORITHMS[algorithm](SPACE, GOALS, 0), GOALS, trials=count)
    return [answer(SPACE.spec(questions.suggest(str(number))), number) for number in range(count)]


# ---- algorithms and budgets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_asks_the_baseline_first_then_different_questions(algorithm):
    questions = Questions(SPACE, ALGORITHMS[algorithm](SPACE, GOALS, 3), GOALS, trials=14)
    asked = []
    for number in range(14):
        config = questions.suggest(str(number))
        asked.append(SPACE.spec(config).digest)
        questions.on_trial_complete(str(number), {"quality": 2.0 + number % 3, "latency": 1.0 + number % 5})
    assert asked[0] == BASE.digest
    assert len(set(asked)) == 14
    assert questions.suggest("15") == "FINISHED"
    assert not questions.ended, "its trials are spent, which is no early end"


def test_chance_does_not_draw_again_what_a_random_search_of_the_same_seed_drew():
    sampled = ALGORITHMS["random"](SPACE, GOALS, 5)
    for _ in SPACE.first_points():
        sampled.ask()
    drawn = [sampled.ask() for _ in range(9)]
    by_chance = [sampled.ask(refused=99) for _ in range(9)]
    assert not any(config in drawn for config in by_chance)


def test_a_small_space_ends_when_all_of_it_was_asked():
    space = SearchSpace(BASE, {"sliding_window": {}}, densities=(0.2, 0.2), block_sizes=(8, 16))
    questions = Questions(space, ALGORITHMS["grid"](space, GOALS, 0), GOALS, trials=99)
    assert [questions.suggest(str(n)) == "FINISHED" for n in range(4)] == [False, False, False, True]
    assert questions.ended


def test_no_trial_begins_after_the_time_budget():
    questions = Questions(SPACE, ALGORITHMS["tpe"](SPACE, GOALS, 0), GOALS, trials=9, deadline=0.0)
    assert questions.suggest("0") == "FINISHED"
    assert questions.ended


def test_what_earlier_runs_answered_counts_and_is_not_asked_again():
    done = history(SPACE, answers(7))
    assert len(done) == 7
    questions = Questions(SPACE, ALGORITHMS["tpe"](SPACE, GOALS, 0), GOALS, trials=10, earlier=done)
    more = [SPACE.spec(questions.suggest(str(number))).digest for number in range(3)]
    assert not {answered.spec.digest for answered in done} & set(more)
    assert questions.suggest("x") == "FINISHED"


def test_a_history_takes_only_answers_to_this_search():
    own = answers(3)
    other = answer(replace(SPACE.spec(SPACE.first_points()[1]), train_steps=91), 7)
    speed = answer(replace(BASE, task="speed"), 8)
    assert [answered.record for answered in history(SPACE, [*own, other, speed])] == own


@pytest.mark.parametrize(
    ("causes", "is_done"),
    [
        (["question"], True),
        (["machine"], False),
        (["machine"] * 9, False),
        (["unknown"], False),
        ([None], False),
        ([None, "machine", "unknown"], True),
        (["machine", "ok"], True),
    ],
    ids=["its own fault", "the machine's", "always", "unknown", "an older row", "unknown twice", "answered since"],
)
def test_a_trial_that_failed_for_an_outside_reason_is_asked_again_and_one_of_its_own_fault_is_not(causes, is_done):
    """The dense baseline too."""
    spec = SPACE.spec(SPACE.first_points()[0])
    rows = [
        answer(spec, number) if cause == "ok" else replace(answer(spec, number), status="failed", error_cause=cause)
        for number, cause in enumerate(causes)
    ]
    done = history(SPACE, rows)
    questions = Questions(SPACE, ALGORITHMS["tpe"](SPACE, GOALS, 0), GOALS, trials=5, earlier=done)
    assert [answered.record for answered in done] == rows[-1:] * is_done
    assert (SPACE.spec(questions.suggest("0")) == spec) is not is_done


def test_a_row_that_a_newer_version_asked_is_passed_over_and_hides_no_other():
    found = answers(3)
    newer = json.dumps(json.loads(found[1].spec) | {"new_option": 1})
    told = []
    rows = [found[0], replace(found[1], spec=newer), found[2]]
    earlier = history(SPACE, rows, pass_over=lambda *words: told.append(words))
    assert [one.record.trial_id for one in earlier] == [found[0].trial_id, found[2].trial_id]
    ((trial, reason),) = told
    assert trial == found[1].trial_id
    assert "new_option" in reason


# ---- objectives ----------------------------------------------------------------------------------------------------


def test_bounds_are_read_with_their_units_and_keep_a_record_off_the_front():
    quality, latency, memory = named_objectives(["quality:max>=0.5", "latency<=2ms", "memory <= 1.5KiB"], "max")
    assert (quality.least, quality.goal, latency.most, memory.most) == (0.5, "max", 2.0, 1536.0)
    assert latency.excess(2.5) == 0.5
    assert str(latency) == "latency <= 2"
    records = [
        answer(BASE, n, quality=q, forward_backward_ms_p50=ms) for n, (q, ms) in enumerate([(0.9, 3.0), (0.8, 2.0)])
    ]
    assert [record.trial_id for record in pareto_front(records, [quality, latency])] == ["run-001"]


@pytest.mark.parametrize("text", ["latency<2", "latency<=", "speed", "latency<=2parsec", "latency:up", ""])
def test_an_objective_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match=r"objectives must be|unit must be"):
        named_objectives([text], "min")


# ---- early stopping ------------------------------------------------------------------------------------------------


def decisions(halving, values, density):
    """What is decided about trials that come to the first rung one after another."""
    found = []
    for number, value in enumerate(values):
        trial = SimpleNamespace(trial_id=f"{density}-{number}", config={"density": density})
        halving.on_trial_add(None, trial)
        found.append(halving.on_trial_result(None, trial, {STEPS: halving.rungs[0], QUALITY: value}))
    return found


def test_a_trial_is_stopped_for_what_others_of_its_density_reached_only():
    halving = StratifiedHalving(90, "min")
    assert halving.rungs == [30]
    dense = decisions(halving, [2.0, 2.1, 2.2, 2.3], density=0.4)
    sparse = decisions(halving, [3.0, 3.5, 3.6, 2.9], density=0.05)
    go, stop = TrialScheduler.CONTINUE, TrialScheduler.STOP
    assert dense == [go, stop, stop, stop]
    assert sparse == [go, stop, stop, go], "the sparse are worse than all of the dense, and not stopped for that"
    alone = [{"family": "dense"}, {"family": "reference", "reference": 0}, {"family": "reference", "reference": 1}]
    assert len({stratum(config) for config in alone} | {stratum({"density": 0.4})}) == 4


def test_a_resumed_search_compares_with_what_earlier_trials_reached():
    records = answers(9)
    points = [SeriesPoint(r.trial_id, "bits_per_byte", 30, 0, 1.0) for r in records]
    earlier = history(SPACE, records)
    halving = StratifiedHalving(90, "min")
    halving.replay(earlier, points)
    density = next(a.config["density"] for a in earlier if "density" in a.config)
    assert decisions(halving, [5.0], density) == [TrialScheduler.STOP]
    assert decisions(StratifiedHalving(90, "min"), [5.0], density) == [TrialScheduler.CONTINUE]


# ---- the cost model ------------------------------------------------------------------------------------------------


def test_costs_are_predicted_from_a_few_trials_and_not_from_fewer():
    records = answers(12)
    sparse = [record for record in records if record.variant == "base"]
    assert CostModel.learned(sparse[: ENOUGH - 1]) is None
    model = CostModel.learned(records)
    spec = SPACE.spec({"family": "random", "density": 0.33, "block_size": 16})
    predicted = model.predict(spec)
    assert predicted.forward_backward_ms_p50 == pytest.approx(3 * milliseconds(spec), rel=0.1)
    assert predicted.density == pytest.approx(0.33, rel=0.05)
    assert model.trial_seconds(spec) == pytest.approx(9.0, rel=0.2)


def test_a_ring_is_predicted_from_its_plan_and_from_the_link_that_was_measured():
    """Two ranks of a free link share the work; a slow one costs what its bytes take, which the plan knows."""
    records, spec = answers(12), RINGS.spec(RING)
    alone, free = CostModel.learned(records).predict(spec.alone), CostModel.learned(records).predict(spec)
    assert 0.4 * alone.forward_backward_ms_p50 < free.forward_backward_ms_p50 < 0.8 * alone.forward_backward_ms_p50
    assert free.peak_bytes > 0.5 * alone.peak_bytes, "a rank holds its share, and what is under way"
    plans, byte_ms = plans_of(spec), 1e-4
    forward_bytes = sum(plan.bytes_sent(4, 32, 4) for plan in plans)
    messages = [SeriesPoint(records[-1].trial_id, LINK, size, 0, size * byte_ms) for size in (1 << 12, 1 << 20)]
    slow = CostModel.learned(records, messages)
    assert slow.predict(spec).forward_ms_p50 > 0.3 * byte_ms * forward_bytes > free.forward_ms_p50
    strangers = [replace(point, trial_id="of-another-machine") for point in messages]
    assert CostModel.learned(records, strangers).predict(spec) == free
    told = sum(predict(work_of(plan), sizes_of(spec), slow.hardware).forward_backward_bytes for plan in plans)
    assert free.wire_bytes == told
    small = CostModel.learned(records).predict(RINGS.spec({**RING, "codec": RINGS.choices("codec")[1]}))
    assert 2 * forward_bytes < small.wire_bytes < free.wire_bytes
    assert slow.trial_seconds(spec) > CostModel.learned(records).trial_seconds(spec)


def test_what_rings_took_beyond_the_formula_is_expected_of_the_next_one():
    records, spec = answers(12), RINGS.spec(RING)
    formula = CostModel.learned(records).predict(spec)
    took = {"forward_ms_p50": formula.forward_ms_p50 + 5.0, "forward_backward_ms_p50": 70.0}
    model = CostModel.learned([*records, answer(spec, 50, **took)])
    assert model.predict(spec).forward_ms_p50 == pytest.approx(took["forward_ms_p50"])
    assert model.predict(spec).forward_backward_ms_p50 == pytest.approx(70.0)
    assert model.predict(spec.alone) == CostModel.learned(records).predict(spec.alone)


def test_what_lost_some_of_its_gradients_is_no_measure_for_what_lost_none():
    screen = Screen(GOALS)
    for record in answers(9):
        screen.learn(record)
    int8 = RINGS.choices("codec")[1]
    bad = answer(RINGS.spec({**RING, "density": 0.5, "codec": int8}), 90, quality=9.0)
    strided = {"family": "strided", "density": 0.06, "block_size": 16, "world_size": 1, "strided.stride": "2"}
    good = answer(RINGS.spec(strided), 91, quality=1.97)
    screen.learn(bad)
    screen.learn(good)
    asked = {**RING, "density": 0.45}
    assert screen(RINGS.spec(asked)) is None
    assert screen(RINGS.spec({**asked, "codec": int8})) == DOMINATED


def test_a_question_that_is_far_beaten_already_is_screened_and_a_hopeful_one_is_not():
    screen = Screen(GOALS)
    for record in answers(9):
        screen.learn(record)
    costly = SPACE.spec({"family": "random", "density": 0.5, "block_size": 16})
    cheap = SPACE.spec({"family": "random", "density": 0.06, "block_size": 16})
    assert (screen(costly), screen(cheap)) == (None, None), "equal qualities: nothing is beaten by a margin"
    screen.learn(
        answer(SPACE.spec({"family": "strided", "density": 0.1, "block_size": 16, "strided.stride": "2"}), 90, 1.5)
    )
    assert screen(costly) == DOMINATED
    assert screen(cheap) is None
    assert screen(BASE) is None


def test_a_question_that_cannot_keep_a_bound_is_screened():
    screen = Screen([quality_objective("min"), replace(LATENCY, most=1.0)])
    for record in answers(9):
        screen.learn(record)
    assert screen(SPACE.spec({"family": "random", "density": 0.5, "block_size": 16})) == OUT_OF_BOUNDS


def test_where_layers_differ_it_is_the_same_rules_that_are_compared():
    space = replace(SPACE, per_layer=True)
    asked = {"family": "per_layer", "density": 0.3, "block_size": 16, "layer0": "random", "layer1": "dense"}
    screen = Screen(GOALS)
    for record in [*answers(9), answer(space.spec(asked | {"density": 0.4}), 90, 9.0)]:
        screen.learn(record)
    fast = {"family": "strided", "density": 0.1, "block_size": 16, "strided.stride": "2"}
    screen.learn(answer(space.spec(fast), 91, 2.5))
    assert screen(space.spec(asked)) == DOMINATED, "denser, it was worse than 2.5"
    assert screen(space.spec(asked | {"layer0": "dense", "layer1": "random"})) is None
    shared = replace(RINGS, per_layer=True)
    ring = asked | {"world_size": 2, "codec": shared.choices("codec")[0]}
    assert screen(shared.spec(ring)) == DOMINATED, "the same layers, by however many ranks"
    assert screen(shared.spec(ring | {"layer0": "dense", "layer1": "random"})) is None


def test_a_dry_run_lists_what_would_be_asked_with_its_costs():
    plan = Plan(6, GOALS, algorithm="random")
    plain = list(dry_run(SPACE, plan, [], []))
    assert len(plain) == 1 + 6 + 2
    assert plain[1].startswith("dense")
    assert "no costs" in plain[-1]
    records = answers(9)
    lines = list(dry_run(SPACE, plan, history(SPACE, records[:2]), records, workers=2))
    assert len(lines) == 1 + 4 + 2
    assert "4 trials would run after 2 that are done" in lines[-2]
    assert "on 2 worker(s) of machine (fitted on" in lines[-1]
    assert all(float(line.split()[-1]) > 8 for line in lines[1:5])
    learned = replace(SPACE, families={"adaptive": {}, "random": {}}, per_layer=True)
    lines = list(dry_run(learned, Plan(4, GOALS), [], records))
    assert [line.split("  ")[0] for line in lines[1:5]] == ["dense", "adaptive", "random", "adaptive / random"]


def test_a_dry_run_tells_what_rings_send_and_with_rows_enough_how_long_they_take():
    plain = list(dry_run(RINGS, Plan(7, GOALS), [], []))
    ring, small = (
        next(line for line in plain if words in line) for words in ("(2 ranks, balanced)", "balanced, int8)")
    )
    assert int(ring.split()[-2]) > int(small.split()[-2]) > 0
    assert ring.split()[-1] == "-"
    lines = list(dry_run(RINGS, Plan(7, GOALS), [], answers(9)))
    ring = next(line for line in lines if "(2 ranks, balanced)" in line)
    milliseconds, _, _, seconds = map(float, ring.split()[-4:])
    assert min(milliseconds, seconds) > 0


def test_a_dry_run_tells_of_rings_whose_layers_differ():
    space = SearchSpace(BASE, {"random": {}}, (0.2, 0.2), (16,), per_layer=True, world_sizes=(2,))
    lines = list(dry_run(space, Plan(9, GOALS, algorithm="grid"), [], answers(9)))[1:-2]
    told = {line[:58].rstrip(): line[58:].split() for line in lines}
    assert told.pop("dense")[4] == "-"
    alike = told.pop("random (2 ranks, balanced)")
    differ = [told.pop(f"{layers} (2 ranks, balanced)") for layers in ("random / dense", "dense / random")]
    assert not told
    assert [cells[:2] for cells in (alike, *differ)] == [["16", "0.2"]] * 3
    assert all(int(cells[4]) > int(alike[4]) for cells in differ), "a layer that keeps all blocks sends more"


# ---- the front as files --------------------------------------------------------------------------------------------


def test_a_best_file_loads_into_the_factory_and_names_its_question(tmp_path):
    store = Store.create(tmp_path)
    records = [answer(SPACE.spec(point), n, 2.0 - 0.1 * n) for n, point in enumerate(SPACE.first_points())]
    write_front(store, records, GOALS)
    paths = write_front(store, records[:2], GOALS)
    assert sorted(str(path) for path in tmp_path.glob("front/*/best.json")) == sorted(paths), (
        "no point of an older front"
    )
    best = json.loads(Path(paths[0]).read_text())
    record = records[1]
    assert "causal=True" in repr(create_block_sparse_attention(**best["attention"]))
    assert best["layers"] == [best["attention"]] * BASE.num_layers
    assert read_best(paths[0]).spec.digest == best["spec_hash"] == record.spec_hash
    assert best["metrics"]["quality"] == record.quality
    assert best["objectives"] == {"quality": record.quality, "latency": record.forward_backward_ms_p50}
    assert f"--again {paths[0]}" in best["command"]


def test_a_best_file_of_a_ring_loads_with_its_partition_and_its_codec_and_asks_for_as_many_ranks(tmp_path):
    config = {**RING, "codec": RINGS.choices("codec")[1]}
    (path,) = write_front(Store.create(tmp_path), [answer(RINGS.spec(config), 0)], GOALS)
    best = json.loads(Path(path).read_text())
    module = create_block_sparse_attention(**best["attention"])
    assert (module.config.partition, module.config.gradient_codec["name"]) == ("balanced", "int8")
    again = read_best(path).spec
    assert again == RINGS.spec(config)
    assert again.ranks == Ranks(2, "balanced", module.config.gradient_codec, module.config.gradient_codec)


def test_a_best_file_of_a_learned_pattern_loads_too(tmp_path):
    space = SearchSpace(BASE, {"adaptive": {}}, block_sizes=(16,))
    (path,) = write_front(Store.create(tmp_path), [answer(space.spec(space.first_points()[1]), 0)], GOALS)
    module = create_block_sparse_attention(**json.loads(Path(path).read_text())["attention"])
    assert module.source.num_heads == BASE.num_heads


def test_a_best_file_of_layers_that_differ_has_a_list_that_loads(tmp_path):
    space = replace(SPACE, per_layer=True)
    asked = {"family": "per_layer", "density": 0.3, "block_size": 16, "layer0": "random", "layer1": "dense"}
    (path,) = write_front(Store.create(tmp_path), [answer(space.spec(asked), 0)], GOALS)
    best = json.loads(Path(path).read_text())
    modules = [create_block_sparse_attention(**layer) for layer in best["attention"]]
    assert ["Random" in repr(modules[0]), "Dense" in repr(modules[1])] == [True, True]
    assert best["layers"] == best["attention"]
    assert read_best(path).spec == space.spec(asked)


def test_a_best_file_of_a_ring_whose_layers_differ_has_modules_that_share_a_partition(tmp_path):
    space = replace(RINGS, per_layer=True)
    asked = {**RING, "family": "per_layer", "layer0": "dense", "layer1": "random"}
    (path,) = write_front(Store.create(tmp_path), [answer(space.spec(asked), 0)], GOALS)
    layers = json.loads(Path(path).read_text())["layers"]
    model = torch.nn.Sequential(*(create_block_sparse_attention(**layer) for layer in layers))
    partition = share_partition(model, Communicator(), BASE.seq_len, BASE.num_heads)
    assert [layer.partition for layer in model] == [partition] * 2
    assert ["Dense" in repr(model[0]), "Random" in repr(model[1])] == [True, True]
    assert read_best(path).spec == space.spec(asked)


def test_the_dense_baseline_on_the_front_loads_too(tmp_path):
    (path,) = write_front(Store.create(tmp_path), [answer(BASE, 0)], GOALS)
    best = json.loads(Path(path).read_text())
    assert "pattern=Dense()" in repr(create_block_sparse_attention(**best["attention"]))


def test_a_front_takes_nothing_away_that_no_search_wrote(tmp_path):
    store, record = Store.create(tmp_path), answer(SPACE.spec(SPACE.first_points()[0]), 0)
    page = tmp_path / "front" / "index.html"
    page.parent.mkdir()
    page.write_text("my web page")
    (path,) = write_front(store, [record], GOALS)
    assert path == f"{tmp_path}/front/01/best.json", "beside it"
    Path(path).write_text("my notes")
    (path,) = write_front(store, [record], GOALS)
    assert path == f"{tmp_path}/front-2/01/best.json"
    assert front_objectives(store) == ["quality", "latency"], "those of the newest front"
    assert page.read_text() == "my web page"
    assert (tmp_path / "front" / "01" / "best.json").read_text() == "my notes"


def test_what_is_not_finite_is_on_no_front_and_in_no_best_file(tmp_path):
    records = [
        replace(answer(SPACE.spec(config), number), quality=quality, train_seconds=math.nan)
        for number, (config, quality) in enumerate(zip(SPACE.first_points(), (2.0, math.inf), strict=False))
    ]
    (path,) = write_front(Store.create(tmp_path), records, GOALS)
    best = json.loads(Path(path).read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert "train_seconds" not in best["metrics"]
    assert best["metrics"]["quality"] == 2.0
    (line,) = left_out(records, GOALS)
    assert records[1].trial_id in line
    assert "quality is inf" in line


def test_a_file_that_is_no_best_file_is_refused(tmp_path):
    path = tmp_path / "best.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"a best.json with the 'spec' of a trial was wanted"):
        read_best(str(path))


def test_references_are_asked_after_the_baseline_and_neither_screened_nor_asked_twice():
    given = (AttentionSpec("base", PatternSpec("sliding_window", {"window": 64}), None, 16),)
    space = replace(SPACE, references=given)
    asked = []
    for algorithm in ALGORITHMS:
        questions = Questions(space, ALGORITHMS[algorithm](space, GOALS, 1), GOALS, trials=3, screen=Screen(GOALS))
        configs = [questions.suggest(str(number)) for number in range(3)]
        asked.append([space.spec(config).attention[0] for config in configs])
        questions.on_trial_complete("1", {"quality": 2.0, "latency": 1.0})
        assert [space.config(space.spec(config)) for config in configs] == configs
    assert all(attentions[:2] == [AttentionSpec("dense"), *given] for attentions in asked)
    screen = Screen([quality_objective("min"), replace(LATENCY, most=1e-9)])
    for record in answers(9):
        screen.learn(record)
    assert screen(space.spec({"family": "reference", "reference": 0})) is None


def test_references_come_from_a_file_too():
    data = {"families": {"random": {}}, "references": [PAPERS[0].to_dict()]}
    assert space_of(data, BASE).references == PAPERS[:1]


def test_the_advantage_is_told_among_trials_as_good_as_dense_only():
    space = replace(SPACE, references=(AttentionSpec("base", PatternSpec("sliding_window", {"window": 64}), None, 16),))
    fast, faster = ({"family": "random", "density": density, "block_size": 16} for density in (0.2, 0.1))
    times = {"forward_backward_ms_p50": 8.0, "forward_ms_p50": None}
    records = [
        answer(BASE, 0, 2.0),
        answer(space.spec(space.fixed_points()[1]), 1, 2.0, **times),
        answer(space.spec(fast), 2, 2.01, **times | {"forward_backward_ms_p50": 2.0}),
        answer(space.spec(faster), 3, 2.02, **times | {"forward_backward_ms_p50": 1.0}),
    ]
    lines = list(advantage(records))
    assert "random 20.0% (2 ms, 2.0100), best reference sliding_window 100.0% (8 ms, 2.0000): 4.00 times" in lines[0]
    assert lines[1].endswith("forward latency: no pattern was found")
    found = records[:1] + records[2:]
    assert not list(advantage(found)), "nothing to compare with"
    half_dense = {**RING, "family": "per_layer", "layer0": "dense", "layer1": "random"}
    ring = answer(replace(RINGS, per_layer=True).spec(half_dense), 4)
    assert not list(advantage([*found, ring])), "its other layer was asked for a density"


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match="algorithm must be one of tpe, nsga2, random, grid, got 'luck'"):
        Plan(3, GOALS, algorithm="luck")
    assert math.isinf(Plan(3, GOALS).time_budget_s)


def test_a_sampler_that_learns_comes_to_a_better_front_than_chance():
    learned, chance = (
        [landscape.volumes(landscape_space(), algorithm, seed, [40])[0] for seed in range(2)]
        for algorithm in ("tpe", "random")
    )
    assert min(learned) > max(chance)


def landscape_space():
    return SearchSpace(
        BASE, {name: {} for name in ("sliding_window", "dilated", "random", "strided")}, (0.05, 0.5), (16,)
    )
