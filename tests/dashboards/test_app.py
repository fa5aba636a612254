"""The app without a browser: addresses, filters, what becomes a component, and every page over every kind of folder."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dash.dcc import Dropdown
from dash.development.base_component import Component

from dashboards.app.__main__ import main
from dashboards.app.address import Address, parse
from dashboards.app.components import components, themed, thumbnail
from dashboards.app.filters import filtered, options
from dashboards.app.folder import Folder
from dashboards.app.frame import PAGES, Drawings, _meant, _walked, make_app
from dashboards.app.pages import search
from dashboards.app.view import Shown, View, view_of
from dashboards.figures.pictures import drawing_info
from dashboards.frames import trial_of
from dashboards.markup import element
from dashboards.page import Page
from dashboards.theme import colour, dark_twins
from raybsa.results.record import Record
from raybsa.results.store import Store
from raybsa.spec import TrialSpec
from tests.dashboards import made
from tests.dashboards.made import DENSE, lm_failure, lm_record, sparse
from tests.dashboards.made_folder import a_folder

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def folder_of(path: Path, *records: Record) -> Folder:
    store = Store.create(path)
    for record in records:
        store.write_record(record)
    return read(path)


def read(path: Path) -> Folder:
    """All of a folder, however slow this machine is: a look reads for a second or so."""
    folder = Folder(str(path))
    folder.refresh()
    while any("still to be read" in note for note in folder.notes):
        folder.refresh()
    return folder


def shown(folder: Folder, page: str, query: str = "") -> tuple[Shown, View]:
    view = view_of(Page(), folder.results, folder.root, parse(f"/{page}", query))
    return PAGES[page].show(view), view


def texts(parts: object) -> str:
    """Every text among components, as a reader would read it."""
    if isinstance(parts, list | tuple):
        return " ".join(map(texts, parts))
    return texts(parts.children) if isinstance(parts, Component) and hasattr(parts, "children") else str(parts or "")


def strings(parts: object, name: str) -> list[str]:
    """The texts that any component, or option of a dropdown, has for a property."""
    if isinstance(parts, list | tuple):
        return [text for part in parts for text in strings(part, name)]
    if isinstance(parts, dict):
        return [str(parts[name])] if name in parts else []
    if not isinstance(parts, Component):
        return []
    value = getattr(parts, name, None)
    own = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    return own + strings([getattr(parts, "children", None), getattr(parts, "options", None)], name)


def kinds_of(parts: object) -> set[str]:
    """The names of all components among others."""
    if isinstance(parts, list | tuple):
        return {name for part in parts for name in kinds_of(part)}
    if not isinstance(parts, Component):
        return set()
    return {type(parts).__name__, *kinds_of(getattr(parts, "children", None))}


def drawn(folder: Folder, page: str, query: str = "") -> str:
    answer, view = shown(folder, page, query)
    return texts([components(part, view.page, dark=False) for part in (answer.top, answer.rest) if part])


def framed(folder: Folder, page: str, query: str = "") -> tuple[str, dict[str, Dropdown]]:
    """A page within its frame: what a reader would read, and the dropdowns by name."""
    _, controls, top, rest = Drawings(folder, own_patterns=False).page(page, query, folder.version, False)
    dropdowns = [label.children[1] for label in controls]
    return texts([top, rest]), {dropdown.id["name"]: dropdown for dropdown in dropdowns}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path = tmp_path_factory.mktemp("whole")
    a_folder(path)
    return read(path)


def test_an_address_goes_into_a_url_and_back() -> None:
    address = Address("search", {"run": ("a b", "c&d"), "density": ("0",), "trial": ("t-1",)})
    assert parse("/search", address.search) == address
    assert address.with_choice("run", []).search == "?density=0&trial=t-1"
    assert parse("/", "?unknown=1&trial=x&trial=y") == Address("", {"trial": ("y",)})
    assert parse(None, None).search == ""


def test_filters_keep_the_rows_that_have_one_of_the_values_of_each(whole: Folder) -> None:
    found = options(whole.results, Address("search"))
    assert {"bigbird", "dense"} <= {option.value for option in found["pattern"]}
    assert [option.label for option in found["density"]] == sorted(
        (option.label for option in found["density"]), key=lambda label: float(label.strip("≤> %"))
    )
    kept = filtered(whole.results, parse("/search", "?pattern=bigbird&pattern=random&run=run-1")).trials
    assert {trial.record.pattern for trial in kept} == {"bigbird", "random"}
    assert {trial.record.run_id for trial in kept} == {"run-1"}
    assert filtered(whole.results, parse("/search", "?pattern=nobody")).trials == ()


def test_a_filter_that_is_set_has_a_control_that_offers_all_its_values(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, lm_record("d", DENSE, 2.2, 40.0), lm_record("w", sparse("sliding_window"), 2.3, 9.0))
    assert "run" not in framed(folder, "search")[1], "there is one run: nothing to choose"
    controls = framed(folder, "search", "?pattern=bigbird&pattern=dense&run=zzz&density=3&density=x")[1]
    for name, chosen in (("pattern", ["bigbird", "dense"]), ("run", ["zzz"]), ("density", ["3", "x"])):
        assert controls[name].value == chosen
        assert set(chosen) <= {option["value"] for option in controls[name].options}
    assert {"value": "3", "label": "≤ 15 %"} in controls["density"].options


def test_no_dropdown_is_sent_the_one_name_over_which_javascript_throws(tmp_path: Path) -> None:
    """Every other name, of a run or a device, is sent as it is; what comes back is what was meant."""
    names = ["__proto__", "\u200b__proto__", "constructor", "toString", "plain"]
    folder = folder_of(
        tmp_path, *(lm_record(f"t{n}", DENSE, 2.2, 40.0, device_name=name) for n, name in enumerate(names))
    )
    dropdown = framed(folder, "search", "?device=__proto__&device=plain")[1]["device"]
    sent = [option["value"] for option in dropdown.options]
    assert "__proto__" not in [*sent, *dropdown.value]
    assert [_meant(value) for value in dropdown.value] == ["__proto__", "plain"]
    assert sorted(_meant(value) for value in sent) == sorted(names)
    assert {"constructor", "toString", "plain"} <= set(sent)
    walked = _walked(Address("search"), {"type": "choice", "name": "device"}, dropdown.value)
    assert walked.chosen["device"] == ("__proto__", "plain")


@pytest.mark.parametrize("page", PAGES)
def test_names_of_any_length_are_cut_and_whole_on_demand(tmp_path: Path, page: str) -> None:
    columns = sparse("vertical_slash", 0.2, columns=list(range(0, 4096, 8)), diagonals=[0])
    name = "mine:" + "X" * 3000
    long = [
        lm_record("columns", columns, 2.3, 9.0),
        lm_record("letters", sparse(name), 2.2, 8.0, device_name="D" * 999),
    ]
    folder = folder_of(tmp_path, lm_record("d", DENSE, 2.2, 40.0), *long, lm_failure("failed", columns, "boom"))
    _, controls, top, rest = Drawings(folder, own_patterns=False).page(page, "", folder.version, False)
    shown = [*strings(top, "children"), *strings(rest, "children"), *strings(controls, "label")]
    names = [text for text in shown if "create_block_sparse_attention" not in text]  # which is to be copied whole
    assert max(map(len, names), default=0) <= 330
    if page == "search":
        card, detail = Drawings(folder, own_patterns=False).chosen(page, "?trial=letters", folder.version, False)
        assert any(name in text for text in strings([card, detail], "title"))
        beside = strings([card, detail], "children")
        assert max(len(text) for text in beside if "create_block_sparse_attention" not in text) <= 330
        assert any("D" * 999 in text for text in strings(controls, "title"))


@pytest.mark.parametrize("page", PAGES)
def test_filters_that_leave_nothing_are_named_and_no_command_is_told(whole: Folder, page: str) -> None:
    told = framed(whole, page, "?device=b&pattern=bigbird&pattern=strided&density=0")[0]
    assert "The filters leave nothing to show here" in told
    assert "pattern bigbird or strided; device b; density ≤ 1.5 %" in told
    assert "python jobs/" not in told


def test_what_an_address_asks_for_and_is_not_there_is_said(whole: Folder) -> None:
    told = framed(whole, "nopage")[0]
    assert "There is no page 'nopage'; these are: search, benchmark" in told
    told, controls = framed(whole, "forecast", "?ranks=-5&hardware=abacus")
    assert "up to how many ranks: there is no '-5' here; what is shown is 128." in told
    assert "hardware: there is no 'abacus' here; what is shown is fitted to the rows here." in told
    assert controls["ranks"].value == "128"
    assert "question: there is no 'nope' here; what is shown is byte_lm" in framed(whole, "search", "?question=nope")[0]
    card, detail = Drawings(whole, own_patterns=False).chosen("search", "?trial=nope", whole.version, False)
    assert texts(card).startswith("No trial 'nope' is here; what is shown is the first of the front. 1. ")
    assert detail
    card, _ = Drawings(whole, own_patterns=False).chosen("search", "?trial=bigbird-0.25", whole.version, False)
    assert "is here" not in texts(card)


def test_of_a_url_with_very_many_parameters_the_first_are_read() -> None:
    assert parse("/search", "?run=a" + "&x=1" * 5000 + "&run=b") == Address("search", {"run": ("a",)})


@pytest.mark.parametrize("page", PAGES)
def test_every_page_shows_what_is_there(whole: Folder, page: str) -> None:
    answer, view = shown(whole, page)
    assert view.page.figures, f"{page} draws nothing"
    assert len(components(answer.top, view.page, dark=True)) >= 1


@pytest.mark.parametrize("page", PAGES)
def test_a_page_without_rows_says_what_to_run(tmp_path: Path, page: str) -> None:
    folder = Folder(str(tmp_path / "nothing here"))
    folder.refresh()
    assert "python jobs/" in drawn(folder, page)
    assert "without a reload" in drawn(folder, page)


@pytest.mark.parametrize("page", PAGES)
def test_a_half_finished_run_is_shown_as_far_as_it_is(tmp_path: Path, page: str) -> None:
    unmeasured = lm_record("early", sparse("bigbird"), 2.3, 9.0, forward_backward_ms_p50=None, forward_ms_p50=None)
    folder = folder_of(tmp_path, lm_failure("broken", sparse("strided"), "WorkerDied"), unmeasured)
    assert drawn(folder, page)


@pytest.mark.parametrize("page", PAGES)
def test_rows_of_an_older_schema_are_shown(tmp_path: Path, page: str) -> None:
    first = {"trial_id", "run_id", "created_at", "status", "spec", "spec_hash", "seed", "task", "variant", "pattern"}
    first |= {"block_size", "seq_len", "density", "quality_name", "quality_goal", "quality", "forward_backward_ms_p50"}
    records = [lm_record("d", DENSE, 2.2, 40.0), lm_record("a", sparse("bigbird"), 2.3, 9.0, run_id="run-2")]
    Store.create(tmp_path)
    rows = [{name: value for name, value in asdict(record).items() if name in first} for record in records]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "records" / "compacted-old.parquet")
    folder = Folder(str(tmp_path))
    folder.refresh()
    assert not folder.notes
    assert drawn(folder, page)


def test_a_row_that_cannot_be_read_is_named_and_hides_no_other(tmp_path: Path) -> None:
    odd = replace(lm_record("odd-one", DENSE, 2.0, 9.0), spec='{"task": "byte_lm"}')
    folder = folder_of(tmp_path, lm_record("good", DENSE, 2.2, 40.0), odd)
    assert [trial.id for trial in folder.results.trials] == ["good"]
    assert any("odd-one" in note for note in folder.notes)


def test_the_version_grows_with_new_rows_and_only_with_them(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, lm_record("a", DENSE, 2.2, 40.0))
    before = folder.version
    assert folder.refresh() == before
    Store(tmp_path).write_record(lm_record("b", sparse("bigbird"), 2.3, 9.0))
    assert folder.refresh() == before + 1
    assert [trial.id for trial in folder.results.trials] == ["a", "b"]


def test_a_reader_who_comes_sees_what_was_read_and_the_next_look_reads_on(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, lm_record("early", DENSE, 2.2, 40.0))
    Store(str(tmp_path)).write_record(lm_record("late", sparse("bigbird"), 2.3, 9.0))
    assert (folder.look(None), len(folder.results.trials)) == (1, 1)
    assert (folder.look(1), len(folder.results.trials)) == (2, 2)
    assert Folder(str(tmp_path)).look(None) == 1, "where nothing was read yet, it is"


def test_the_trial_of_the_address_is_the_one_that_is_shown(whole: Folder) -> None:
    view = shown(whole, "search", "?trial=bigbird-0.25")[1]
    parts = search.chosen(view)
    assert parts is not None
    told = texts([components(part, view.page, dark=False) for part in parts])
    assert "bigbird-0.25" in told
    assert "made by job search, commit 0123456789ab, 2026-03-01 10:12 UTC" in told
    assert "train loss" in told


def test_a_clicked_trial_whose_layers_differ_shows_each_of_them(tmp_path: Path) -> None:
    window = sparse("sliding_window", 0.25)
    mixed = TrialSpec("byte_lm", (window, DENSE, window), num_layers=3)
    measured = {"quality": 2.1, "quality_name": "bits_per_byte", "quality_goal": "min", "forward_backward_ms_p50": 9.0}
    dense = made.record("d", TrialSpec("byte_lm", (DENSE,), num_layers=3), **measured | {"quality": 2.0})
    folder = folder_of(tmp_path, dense, made.record("mixed", mixed, **measured))
    view = shown(folder, "search", "?trial=mixed")[1]
    told = texts([components(part, view.page, dark=False) for part in search.chosen(view) or ()])
    assert "layers 0, 2, all heads" in told
    assert "layer 1, all heads" in told
    assert "[create_block_sparse_attention(**layer) for layer in [" in told


def test_two_runs_are_compared_by_their_equal_questions(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        lm_record("a1", sparse("bigbird"), 2.3, 10.0, run_id="A"),
        lm_record("a2", sparse("strided"), 2.3, 10.0, run_id="A"),
        lm_record("b1", sparse("bigbird"), 2.3, 20.0, run_id="B", created_at="2026-03-02T00:00:00+00:00"),
    )
    told = drawn(folder, "compare")
    assert "1 trial of the same spec and seed. In the middle, B takes 2× the time of A." in told
    assert "takes 0.5× the time of A" in drawn(folder, "compare", "?a=B&b=A")
    assert shown(folder, "compare")[0].controls[0].value == "A"


def test_no_text_of_a_row_is_ever_html(tmp_path: Path) -> None:
    fields = {"run_id": HOSTILE, "device_name": HOSTILE, "quality_name": HOSTILE, "backend": HOSTILE}
    folder = folder_of(
        tmp_path,
        lm_record("a", sparse(HOSTILE), 2.3, 9.0, **fields),
        lm_record("b", sparse("bigbird"), 2.2, 9.5, **fields),
        lm_failure("c", sparse(HOSTILE), HOSTILE),
    )
    for page in PAGES:
        answer, view = shown(folder, page)
        made = [components(part, view.page, dark=False) for part in (answer.top, answer.rest) if part]
        assert not kinds_of(made) & {"Markdown", "Iframe", "Script", "DangerouslySetInnerHTML"}
        assert page != "search" or HOSTILE in texts(made)
        assert "<img" not in json.dumps(view.page.figures), "Plotly reads tags in its texts"


def test_a_figure_in_the_dark_has_only_dark_twins() -> None:
    figure = {"layout": {"paper_bgcolor": colour("paper"), "font": {"color": colour("ink")}}}
    assert themed(figure, False) is figure
    assert themed(figure, True)["layout"]["font"]["color"] == dark_twins()[colour("ink")]


def test_a_thumbnail_is_an_image_without_any_text_of_the_row() -> None:
    panel = drawing_info(trial_of(lm_record("a", sparse("bigbird"), 2.3, 9.0)).spec).panels[0]
    assert thumbnail(panel._replace(caption=HOSTILE)) == thumbnail(panel)
    assert thumbnail(panel).startswith("data:image/svg+xml;base64,")


def test_elements_become_components_with_their_attributes() -> None:
    (made,) = components(element("div", "a <b>", class_="note", style="min-height:3px"), Page(), dark=False)
    assert isinstance(made, Component)
    assert (made.className, made.style, made.children) == ("note", {"minHeight": "3px"}, ["a <b>"])


def test_the_app_listens_on_this_machine_alone_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict] = []
    monkeypatch.setattr("dash.Dash.run", lambda self, **options: asked.append(options))
    monkeypatch.setattr("dashboards.app.__main__.free_port", lambda host, port: port)
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path), "--host", "0.0.0.0", "--port", "9000"]) == 0
    assert asked == [{"host": "127.0.0.1", "port": 8050}, {"host": "0.0.0.0", "port": 9000}]
    assert "http://127.0.0.1:8050" in capsys.readouterr().out


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_port_that_is_none_ends_the_app_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], port: str
) -> None:
    assert main([str(tmp_path), "--port", port]) == 2
    assert capsys.readouterr().err == f"error: --port must be in 1..65535, or 0 for any free one, got {port}\n"


def test_a_port_in_use_ends_the_app_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([str(tmp_path), "--port", str(port)]) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"error: cannot listen at 127.0.0.1, port {port}: Address already in use")
    assert told.err.count("\n") == 1
    assert not told.out


def test_port_0_is_any_free_one_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ports: list[int] = []
    monkeypatch.setattr("dash.Dash.run", lambda self, host, port: ports.append(port))
    assert main([str(tmp_path), "--port", "0"]) == 0
    assert 0 < ports[0] <= 65535
    assert f":{ports[0]} shows" in capsys.readouterr().out


def test_every_answer_forbids_other_sources(tmp_path: Path) -> None:
    answer = make_app(Folder(str(tmp_path))).server.test_client().get("/search?run=x")
    assert answer.status_code == 200
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
