"""The numbers behind each figure, apart from Plotly; then what the plots do with them."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from dashboards.figures.curves import curves_info, curves_plot, later_range
from dashboards.figures.front_numbers import Place, front_numbers
from dashboards.figures.labels import add_end_labels
from dashboards.figures.pareto import ParetoInfo, pareto_info, pareto_plot, thinned
from dashboards.figures.pictures import ABOVE, MAX_BLOCKS, MAX_CELLS, drawing_info, picture_plot
from dashboards.figures.scaling import FORWARD, FORWARD_BACKWARD, MEMORY, scaling_info, scaling_plot, split_by_pattern
from dashboards.figures.two_runs import changes_plot, pairs
from dashboards.frames import Trial, trial_of
from dashboards.theme import base_figure, colour, density_colour
from raybsa import patterns
from raybsa.results.record import Record, SeriesPoint
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from tests.dashboards.made import DENSE, a_benchmark, curve, lm_record, sparse, speed_record


def trials(*records: Record) -> list[Trial]:
    return [trial_of(record) for record in records]


def four_points(goal: str) -> ParetoInfo:
    qualities = {"fast": 2.5, "middle": 2.3, "beaten": 2.4, "dense": 2.2}
    times = {"fast": 5.0, "middle": 10.0, "beaten": 20.0, "dense": 40.0}
    sign = 1 if goal == "min" else -1
    return pareto_info(
        trials(
            *(
                lm_record(
                    name, DENSE if name == "dense" else sparse("bigbird"), sign * q, times[name], quality_goal=goal
                )
                for name, q in qualities.items()
            )
        )
    )


# ---- Pareto --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", ["min", "max"])
def test_the_front_is_numbered_from_the_fastest_and_the_beaten_trial_is_off_it(goal: str) -> None:
    info = four_points(goal)
    assert {p.trial.id: p.rank for p in info.points} == {"fast": 1, "middle": 2, "beaten": None, "dense": 3}
    assert [p.trial.id for p in info.front] == ["fast", "middle", "dense"]
    assert [info.speed_up(p) for p in info.front] == [8.0, 4.0, 1.0]


def test_a_point_is_off_the_front_iff_another_is_better_and_faster() -> None:
    draw = random.Random(3)
    made = [lm_record(f"t{i}", sparse("bigbird"), draw.randint(0, 9), draw.randint(1, 9)) for i in range(60)]
    points = pareto_info(trials(*made)).points
    for p in points:
        others = [o for o in points if (o.latency_ms, o.quality) != (p.latency_ms, p.quality)]
        beaten = any(o.latency_ms <= p.latency_ms and o.quality <= p.quality for o in others)
        assert (p.rank is None) == beaten


def test_a_trial_without_a_time_is_counted_not_drawn() -> None:
    info = pareto_info(
        trials(lm_record("a", DENSE, 2.2, 4.0), lm_record("b", DENSE, 2.2, 4.0, forward_backward_ms_p50=None))
    )
    assert (len(info.points), info.unmeasured, info.latency_label) == (1, 1, "forward + backward")


def test_forward_alone_is_the_latency_where_no_trial_measured_both() -> None:
    info = pareto_info(
        trials(lm_record("a", sparse("bigbird"), 2.2, 4.0, forward_backward_ms_p50=None, forward_ms_p50=3.0))
    )
    assert (info.points[0].latency_ms, info.latency_label, info.speed_up(info.points[0])) == (3.0, "forward", 4.0)


def test_the_area_of_a_point_grows_evenly_with_its_memory() -> None:
    sizes = (100, 200, 300)
    info = pareto_info(trials(*(lm_record(f"m{s}", DENSE, 2.2, 4.0, peak_bytes=s) for s in sizes)))
    small, middle, large = (p.diameter**2 for p in info.points)
    assert middle - small == pytest.approx(large - middle)
    assert large > 2 * small


def test_the_picture_shows_each_trial_once_and_dense_apart() -> None:
    figure = pareto_plot(four_points("min"))
    by_name = {trace.name: list(trace.customdata or ()) for trace in figure.data if trace.name != "front line"}
    assert by_name == {"dominated": ["beaten"], "front": ["fast", "middle"], "dense baseline": ["dense"]}
    dense = next(trace for trace in figure.data if trace.name == "dense baseline")
    assert (dense.marker.symbol, dense.marker.color) == ("diamond", colour("dense"))
    assert "ms" in figure.layout.xaxis.title.text
    assert "bits per byte (lower is better)" in figure.layout.yaxis.title.text


def test_points_of_the_front_that_hide_one_another_s_numbers_have_a_joint_one() -> None:
    row = [Place(x, y, 20.0) for x, y in ((0.0, 1.0), (0.001, 0.999), (0.002, 0.998), (0.5, 0.5), (1.0, 0.0))]
    assert front_numbers(row, row) == ["", "", "1–3", "4", "5"]
    assert front_numbers(row[:3], row[:3]) == ["1", "2", "3"], "nothing else is drawn: the axes are theirs"
    assert front_numbers(row[:1], row[:1]) == ["1"]
    far = lm_record("far", DENSE, 3.0, 900.0)
    near = [lm_record(f"near{i}", sparse("bigbird"), 2.3 - i / 1000, 9.0 + i / 1000) for i in range(2)]
    figure = pareto_plot(pareto_info(trials(*near, far)))
    assert [note.text for note in figure.layout.annotations] == ["1–2", "dense"]
    assert all("1" not in (trace.text or ()) for trace in figure.data)


# ---- speed and memory ----------------------------------------------------------------------------------------------


def test_the_ideal_is_the_dense_time_times_the_density() -> None:
    everything = trials(*a_benchmark())
    own = split_by_pattern(everything)["bigbird · base · blocked"]
    info = scaling_info(own, everything, FORWARD)
    assert info is not None
    assert info.dense == [(1024, 6.25), (2048, 25.0), (4096, 100.0), (8192, 400.0)]
    assert [line.density for line in info.lines] == [0.03, 0.1, 0.25]
    for line in info.lines:
        assert line.lengths == [1024, 2048, 4096, 8192]
        assert line.ideal == pytest.approx([n * line.density for n in (6.25, 25, 100, 400)])
        assert line.values == pytest.approx([2 * ideal for ideal in line.ideal])
        assert line.below == pytest.approx([0.05 * v for v in line.values])
        assert line.above == pytest.approx([0.1 * v for v in line.values])


def test_memory_is_in_mebibytes_and_has_no_ideal() -> None:
    own = trials(speed_record("a", sparse("bigbird"), 1024, peak_bytes=3 << 20, dense_peak_bytes=12 << 20))
    info = scaling_info(own, own, MEMORY)
    assert info is not None
    assert (info.lines[0].values, info.lines[0].ideal, info.dense) == ([3.0], [None], [(1024, 12.0)])


def test_the_newest_of_two_equal_questions_is_drawn() -> None:
    own = trials(
        speed_record("new", sparse("bigbird"), 1024, created_at="2026-03-02", forward_ms_p50=7.0),
        speed_record("old", sparse("bigbird"), 1024, created_at="2026-03-01", forward_ms_p50=9.0),
    )
    info = scaling_info(own, own, FORWARD)
    assert info is not None
    assert info.lines[0].values == [7.0]


def test_a_pattern_at_its_own_density_is_one_line_whose_ideal_follows_the_measured_density() -> None:
    own = trials(*(speed_record(f"n{n}", sparse("bigbird", None), n, density=256 / n) for n in (1024, 2048, 4096)))
    info = scaling_info(own, own, FORWARD)
    assert info is not None
    (line,) = info.lines
    assert (line.name, line.density) == ("own", 1 / 16)
    assert line.ideal == [6.25 / 4, 25 / 8, 100 / 16]


def test_what_was_not_measured_gives_no_figure() -> None:
    own = trials(speed_record("a", sparse("bigbird"), 1024, forward_backward_ms_p50=None, peak_bytes=0))
    assert scaling_info(own, own, FORWARD_BACKWARD) is None
    assert scaling_info(own, own, MEMORY) is None


def test_a_dense_trial_counts_as_baseline_and_forms_no_line() -> None:
    everything = trials(speed_record("d", DENSE, 4096), speed_record("a", sparse("bigbird"), 4096))
    groups = split_by_pattern(everything)
    assert list(groups) == ["bigbird · base · blocked"]
    info = scaling_info(groups["bigbird · base · blocked"], everything, FORWARD)
    assert info is not None
    assert info.dense == [(4096, 100.0)]


def test_speed_is_drawn_log_log_with_one_colour_a_density() -> None:
    everything = trials(*a_benchmark())
    info = scaling_info(split_by_pattern(everything)["bigbird · base · blocked"], everything, FORWARD)
    assert info is not None
    figure = scaling_plot(info)
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    assert list(figure.layout.xaxis.ticktext) == ["1K", "2K", "4K", "8K"]
    wanted = {density_colour(0.03), density_colour(0.1), density_colour(0.25), colour("dense")}
    assert {trace.line.color for trace in figure.data} == wanted
    assert [a.text.replace("\u00a0", " ") for a in figure.layout.annotations] == ["3 %", "10 %", "25 %", "dense"]


def test_densities_of_one_colour_differ_in_their_points_and_their_names_say_which() -> None:
    everything = trials(*(speed_record(f"d{d}", sparse("bigbird", d), 1024) for d in (0.05, 0.06, 0.25)))
    info = scaling_info(everything, everything, FORWARD)
    assert info is not None
    figure = scaling_plot(info)
    names = [a.text.replace("\u00a0", " ") for a in figure.layout.annotations]
    assert names == ["● 5 %", "■ 6 %", "25 %", "dense"]
    solid = [trace for trace in figure.data if trace.line.dash != "dot"]
    assert [trace.marker.symbol for trace in solid] == ["circle", "square", "circle", "diamond"]


# ---- learning curves -----------------------------------------------------------------------------------------------


def test_curves_are_grouped_by_name_sorted_by_step_and_drawn_front_last() -> None:
    known = trials(*(lm_record(n, DENSE if n == "d" else sparse("bigbird"), 2.2, 4.0) for n in ("d", "beaten", "best")))
    series = [p for n in ("d", "best", "beaten", "stranger") for p in reversed(curve(n, "train_loss", 2.0, steps=30))]
    series.append(SeriesPoint("best", "bits_per_byte", 30, 0, 2.2))
    infos = curves_info(series, known, {"best": 1, "d": 2})
    assert [info.name for info in infos] == ["bits_per_byte", "train_loss"]
    assert [c.trial.id for c in infos[1].curves] == ["beaten", "best", "d"]
    assert infos[1].curves[0].steps == [0, 10, 20, 30]
    assert [c.rank for c in infos[1].curves] == [None, 1, 2]


def test_points_that_are_not_numbers_are_left_out_and_of_several_ranks_the_lowest_is_drawn() -> None:
    known = trials(lm_record("a", DENSE, 2.2, 4.0))
    series = [SeriesPoint("a", "loss", step, rank, 10.0 * rank + step) for step in (0, 1) for rank in (1, 2)]
    series.append(SeriesPoint("a", "loss", 2, 1, float("nan")))
    assert curves_info(series, known, {})[0].curves[0].values == [10.0, 11.0]


def test_the_axis_of_a_curve_shows_the_second_half() -> None:
    known = trials(lm_record("a", DENSE, 2.2, 4.0))
    series = [SeriesPoint("a", "loss", step, 0, value) for step, value in ((0, 8.0), (40, 5.0), (50, 3.0), (100, 2.0))]
    (info,) = curves_info(series, known, {})
    assert later_range(info.curves) == pytest.approx([1.95, 3.05])
    assert list(curves_plot(info).layout.yaxis.range) == pytest.approx([1.95, 3.05])


def test_one_point_is_a_curve_too() -> None:
    known = trials(lm_record("a", DENSE, 2.2, 4.0))
    (info,) = curves_info([SeriesPoint("a", "accuracy", 0, 0, 1.0)], known, {})
    assert curves_plot(info).data[0].mode == "markers"


# ---- pictures ------------------------------------------------------------------------------------------------------


def test_a_picture_shows_the_blocks_of_the_layout() -> None:
    spec = TrialSpec("byte_lm", (sparse("sink_window", 0.3),), seq_len=1024)
    (panel,) = drawing_info(spec).panels
    dense = patterns.build("sink_window").layout(1024, causal=True, density=0.3).to_dense()[0]
    marks = [["4" if kept else "0" for kept in row] for row in dense.tolist()]
    wanted = ["".join(row[: index + 1]) + ABOVE * (15 - index) for index, row in enumerate(marks)]
    assert (list(panel.rows), panel.caption) == (wanted, "all heads")


def test_a_picture_is_capped_in_cells_and_in_blocks() -> None:
    drawing = drawing_info(TrialSpec("speed", (sparse("bigbird", 0.05),), seq_len=131_072))
    assert drawing.tokens == MAX_BLOCKS * 64
    assert {len(row) for panel in drawing.panels for row in panel.rows} == {MAX_CELLS}


def test_heads_and_layers_that_differ_have_a_panel_each() -> None:
    random_heads = drawing_info(TrialSpec("byte_lm", (sparse("random", 0.3),), seq_len=1024, num_heads=3))
    assert [p.caption for p in random_heads.panels] == ["head 0", "head 1", "head 2"]
    layers = drawing_info(TrialSpec("byte_lm", (sparse("sliding_window", 0.3), DENSE), seq_len=1024))
    assert [p.caption for p in layers.panels] == ["layer 0, all heads", "layer 1, all heads"]
    assert len(picture_plot(layers).data) == 2
    window = sparse("sliding_window", 0.3)
    apart = drawing_info(TrialSpec("byte_lm", (window, DENSE, window), seq_len=1024, num_layers=3))
    assert [p.caption for p in apart.panels] == ["layers 0, 2, all heads", "layer 1, all heads"]


def test_a_results_folder_cannot_choose_what_code_the_report_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sent_by_mail.py").write_text(
        "from raybsa.patterns.sliding_window import SlidingWindow\nclass Mine(SlidingWindow): family = ''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parts = {"parts": [{"name": "dense", "params": {}}, {"name": "sent_by_mail:Mine", "params": {}}]}
    for pattern in (PatternSpec("sent_by_mail:Mine"), PatternSpec("union", parts)):
        spec = TrialSpec("byte_lm", (AttentionSpec("base", pattern),))
        assert "sent_by_mail:Mine is not raybsa's own" in (drawing_info(spec).problem or "")
        assert "sent_by_mail" not in sys.modules
    assert drawing_info(spec, own_patterns=True).problem is None


def test_a_pattern_that_cannot_be_built_says_why() -> None:
    drawing = drawing_info(TrialSpec("byte_lm", (sparse("no_such"),)))
    assert drawing.panels == ()
    assert "no_such" in str(drawing.problem)


def test_a_trial_that_was_stopped_early_is_drawn_as_such_and_is_on_no_front() -> None:
    whole = lm_record("whole", sparse("bigbird"), 2.3, 9.0)
    stopped = lm_record("stopped", sparse("random"), 2.2, 8.0, status="pruned", error="stopped after 3 of 9 steps")
    info = pareto_info([trial_of(whole), trial_of(stopped)])
    assert [point.trial.id for point in info.front] == ["whole"]
    (trace,) = [trace for trace in pareto_plot(info).data if trace.name == "stopped early"]
    assert (trace.customdata, trace.marker.symbol) == (("stopped",), "x-thin")


def test_a_crowd_of_dominated_points_is_thinned_and_no_other() -> None:
    few = trials(*(lm_record(f"t{i}", sparse("bigbird"), 2.5, 9.0 + i) for i in range(20)))
    assert len(pareto_plot(pareto_info(few)).data[1].x) == 19
    many = [p._replace(rank=None) for p in pareto_info(few).points] * 100
    assert 2 <= len(thinned(many)) <= 20
    assert {p.trial.id for p in thinned(many)} <= {p.trial.id for p in many}


def test_a_name_that_the_margin_cannot_hold_loses_its_parameters_first() -> None:
    figure = base_figure(300, right=120)
    names = ["dense", "bigbird(num_globals=1, window=128) · 20 %", "a name that is long without any"]
    add_end_labels(figure, [(float(place), name, "#000000") for place, name in enumerate(names)], [0.0, 3.0])
    assert [label.text for label in figure.layout.annotations] == ["dense", "bigbird · 20 %", "a name that is …"]


# ---- two runs ------------------------------------------------------------------------------------------------------


def test_a_long_name_leaves_its_bar_room_and_is_whole_where_one_points() -> None:
    long = sparse("vertical_slash", 0.11, columns=[0, 256], offsets=[0, 128, 256])
    a, b = (lm_record(name, long, 2.3, ms) for name, ms in (("a", 10.0), ("b", 20.0)))
    figure = changes_plot(pairs(trials(a), trials(b)))
    assert figure is not None
    assert figure.layout.yaxis.ticktext == ("vertical_slash · 11\u00a0%, 2,048 tokens",)
    assert "offsets=[0, 128, 256]" in figure.data[0].customdata[0]
    assert figure.data[0].x == (1.0,)
