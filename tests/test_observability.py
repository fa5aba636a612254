"""Events as lines, metrics and the dashboard that draws them."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from raybsa.cluster import metrics
from raybsa.cluster.trace import Trace
from raybsa.events import Events, read, show

GRAFANA = Path(__file__).parent.parent / "deploy" / "grafana.json"
SERIES = {"histogram": ("_bucket", "_count", "_sum"), "count": ("_total",), "gauge": ("",)}


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]):
    """What ``show`` prints, line by line; afterwards events are silent again."""
    logger = logging.getLogger("raybsa")
    before, level = list(logger.handlers), logger.level
    yield lambda: capsys.readouterr().err.splitlines()
    logger.handlers[:], logger.level = before, level


def test_an_event_is_one_line_of_pairs_that_knows_what_its_source_knows(shown) -> None:
    show()
    show()
    events = Events("raybsa.cluster.member", run="train-1", trial="train-1-000").bind(generation=2, rank=0)
    events.tell("lost", step=7, seconds=0.0312345678, why='no "sign" of\nlife', left=None)
    (line,) = shown()
    assert re.match(r"time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z level=INFO event=lost run=train-1 trial=", line)
    assert dict(list(read(line).items())[2:]) == {
        "event": "lost", "run": "train-1", "trial": "train-1-000", "generation": "2", "rank": "0", "step": "7",
        "seconds": "0.0312346", "why": 'no "sign" of\nlife',
    }  # fmt: skip


def test_nobody_who_did_not_ask_sees_an_event_and_a_handler_finds_its_pairs(shown, caplog) -> None:
    Events("raybsa.cluster").tell("step", step=1)
    assert shown() == []
    with caplog.at_level(logging.INFO, "raybsa"):
        Events("raybsa.cluster").tell("step", step=1)
    (record,) = caplog.records
    assert record.args["fields"] == {"event": "step", "step": 1}


def test_the_dashboard_draws_every_metric_and_none_that_is_not_there() -> None:
    panels = json.loads(GRAFANA.read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    drawn = {name for expression in asked for name in re.findall(r"ray_\w+", expression)}
    made = {
        metric.info["name"]: {f"ray_{metric.info['name']}{end}" for end in SERIES[kind_of(metric)]}
        for metric in metrics.ALL
    }
    assert drawn <= set().union(*made.values())
    assert not [name for name, series in made.items() if not series & drawn]
    labels = {
        label
        for expression in asked
        for group in re.findall(r"by \(([\w, ]+)\)", expression)
        for label in group.split(", ")
    }
    assert labels - {"le"} <= {key for metric in metrics.ALL for key in metric.info["tag_keys"]}


def kind_of(metric) -> str:
    return type(metric).__name__.lower().replace("counter", "count")


def test_each_panel_has_a_place_a_unit_and_a_word_on_what_it_shows() -> None:
    panels = json.loads(GRAFANA.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    assert all(panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in panels)


def test_only_the_step_that_was_named_is_traced(tmp_path: Path) -> None:
    import torch

    trace = Trace(str(tmp_path / "profile"), step=1)
    for step in range(3):
        with trace.of(step, rank=0, trouble=pytest.fail):
            torch.ones(4, 4) @ torch.ones(4, 4)
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "rank0-step1.json"
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert "aten::mm" in names


def test_a_profile_that_cannot_be_written_is_told_and_the_step_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    troubles: list[str] = []
    with Trace(str(tmp_path / "file" / "profile"), step=0).of(0, rank=0, trouble=troubles.append):
        pass
    (trouble,) = troubles
    assert trouble.startswith(f"the profile could not be written to {tmp_path}/file/profile/rank0-step0.json: ")
