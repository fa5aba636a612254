"""Names, specs, unions, rules of one's own, and the command line."""

import subprocess
import sys

import pytest

from raybsa import patterns
from raybsa.patterns.__main__ import main
from raybsa.patterns.catalog import CATALOG
from raybsa.spec import PatternSpec

OWN = """
from dataclasses import dataclass
import torch
from raybsa.patterns import Pattern

@dataclass(frozen=True)
class EveryThird(Pattern):
    phase: int = 0

    def blocks(self, grid):
        columns = torch.arange(self.phase, grid.num_kv_blocks, 3, device=grid.device)
        return grid.rows.repeat_interleave(len(columns)), columns.repeat(grid.num_rows)

not_a_rule = 3
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_patterns_for_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_patterns_for_test"
    sys.modules.pop("own_patterns_for_test", None)


def test_build_takes_a_rule_a_spec_a_dict_and_a_name():
    rule = patterns.BigBird(window=300)
    assert patterns.build(rule) is rule
    assert patterns.build(rule.spec) == rule
    assert patterns.build({"name": "bigbird", "params": {"window": 300}}) == rule
    assert patterns.build("bigbird") == patterns.build({"name": "bigbird"}) == patterns.BigBird()


def test_the_names_of_the_catalog_are_the_names_of_the_families():
    assert {name: cls.family for name, cls in CATALOG.items()} == {name: name for name in CATALOG}


def test_an_unknown_family_lists_what_exists():
    with pytest.raises(
        ValueError, match=r"unknown pattern 'bigbrid'; there are sliding_window, .*bigbird.*module:Name"
    ):
        patterns.build("bigbrid")


def test_an_unknown_parameter_lists_what_exists():
    with pytest.raises(
        ValueError, match="bigbird has no parameter windw; it has window, num_globals, num_random, seed"
    ):
        patterns.build({"name": "bigbird", "params": {"windw": 3}})
    with pytest.raises(ValueError, match="dense has no parameter window; it has none"):
        patterns.build({"name": "dense", "params": {"window": 3}})


def test_a_missing_parameter_is_named():
    with pytest.raises(ValueError, match="blocks needs the parameter path"):
        patterns.build("blocks")
    with pytest.raises(ValueError, match="union needs the parameter parts"):
        patterns.build("union")


@pytest.mark.parametrize("wrong", [3, None, ["bigbird"]])
def test_what_is_no_pattern_is_refused(wrong):
    with pytest.raises(TypeError, match="a pattern is a rule, a PatternSpec, its dict or a name"):
        patterns.build(wrong)


@pytest.mark.parametrize("parts", [[], "bigbird", {"a": 1}])
@pytest.mark.parametrize("name", ["union", "per_head"])
def test_parts_must_be_a_list_of_patterns(name, parts):
    with pytest.raises((TypeError, ValueError), match="list of patterns"):
        patterns.build({"name": name, "params": {"parts": parts}})


def test_a_union_keeps_the_blocks_of_its_parts_and_unions_are_flat():
    a, b, c = patterns.SlidingWindow(window=100), patterns.GlobalBlocks(num_globals=2), patterns.Butterfly()
    union = a | b | c
    assert union.parts == (a, b, c) == (a | (b | c)).parts
    layouts = [rule.layout(3000, causal=True) for rule in (a, b, c)]
    assert union.layout(3000, causal=True).digest() == (layouts[0] | layouts[1] | layouts[2]).digest()
    with pytest.raises(TypeError):
        a | "butterfly"


def test_names_serve_as_parts():
    built = patterns.build(
        {"name": "per_head", "params": {"parts": ["dense", {"name": "random", "params": {"seed": 4}}]}}
    )
    assert built == patterns.per_head([patterns.Dense(), patterns.Random(seed=4)])


def test_a_rule_of_ones_own_is_built_from_module_and_class(own_module):
    rule = patterns.build({"name": f"{own_module}:EveryThird", "params": {"phase": 1}})
    assert rule.spec == PatternSpec(f"{own_module}:EveryThird", {"phase": 1})
    assert patterns.build(rule.spec) == rule
    columns = [set(range(1, 8, 3)) | {i} for i in range(8)]
    made = rule.layout(512)
    assert [set(row.nonzero()[:, 0].tolist()) for row in made.to_dense()[0]] == columns
    thinned = rule.layout(512, density=0.25).to_dense()[0]
    assert [set(row.nonzero()[:, 0].tolist()) for row in thinned] == [
        {i, min((c for c in range(1, 8, 3) if c != i), key=lambda c: (abs(c - i), c))} for i in range(8)
    ]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no_such_module_here:Rule", ValueError, "No module named 'no_such_module_here'"),
        ("own_patterns_for_test:Missing", ValueError, "has no attribute 'Missing'"),
        ("own_patterns_for_test:not_a_rule", TypeError, "must name a subclass of raybsa.patterns.Pattern, got 3"),
        (":Rule", ValueError, "must name something as 'module:Name'"),
        ("own_patterns_for_test:EveryThird", ValueError, "has no parameter stride; it has phase"),
    ],
)
def test_a_module_or_class_that_does_not_serve_is_named(own_module, name, error, message):
    with pytest.raises(error, match=message):
        patterns.build({"name": name, "params": {"stride": 2}})


def test_the_command_line_prints_the_picture(capsys):
    main(["fixed", "--seq-len", "256", "--block-size", "32", "--causal", "--param", "span=4"])
    spec, summary, *picture = capsys.readouterr().out.splitlines()
    assert spec == "{'name': 'fixed', 'params': {'near': None, 'span': 4, 'summary': 1}}"
    assert "256 x 256 tokens" in summary
    assert "causal" in summary
    assert picture == [
        "██··············",
        "████············",
        "██████··········",
        "████████········",
        "      ████······",
        "      ██████····",
        "      ████████··",
        "      ██████████",
    ]


@pytest.mark.parametrize("name", [name for name in CATALOG if name not in ("blocks", "union", "per_head")])
def test_every_family_can_be_looked_at(name, capsys):
    main([name, "--seq-len", "1024", "--density", "0.3", "--heads", "2", "--head", "1"])
    *above, summary = (lines := capsys.readouterr().out.splitlines())[:-16]
    picture = lines[-16:]
    assert ("density 0.3: " in above[-1]) or not CATALOG[name].free
    assert "16 x 16 blocks" in summary
    assert [row[2 * i] for i, row in enumerate(picture)] == ["█"] * 16


def test_the_command_line_tells_what_a_density_came_to(capsys):
    main(["sliding_window", "--seq-len", "4096", "--block-size", "16", "--density", "0.2", "--causal"])
    assert "density 0.2: window of 416 tokens\n" in capsys.readouterr().out


def test_the_command_line_composes(capsys):
    main(
        ["per_head", "--heads", "2", "--head", "1", "--param", 'parts=["dense", "sliding_window"]', "--seq-len", "512"]
    )
    assert "2 groups" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bigbrid"], "unknown pattern 'bigbrid'"),
        (["bigbird", "--param", "window"], "want KEY=VALUE, got 'window'"),
        (["bigbird", "--param", "window=wide"], "window must be an integer >= 1, got 'wide'"),
        (["bigbird", "--density", "2"], "density must lie in"),
        (["bigbird", "--heads", "2", "--head", "5"], "group must lie in 0..1, got 5"),
    ],
)
def test_the_command_line_says_what_was_wanted(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_python_dash_m_runs_and_imports_no_heavy_library():
    code = (
        "import sys, runpy; sys.argv = ['raybsa.patterns', 'dense', '--seq-len', '128'];"
        "runpy.run_module('raybsa.patterns', run_name='__main__');"
        "print(sorted({'ray', 'pyarrow', 'plotly', 'optuna'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-3:] == ["████", "████", "[]"]
