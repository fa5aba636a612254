"""The API reference is made without a warning, and there is something to say about every public name."""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import re
import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import raybsa
from raybsa.results.record import Record
from raybsa.results.store import Store
from tests.dashboards.made import DENSE, curve, lm_record

ROOT = Path(__file__).parent.parent
API = runpy.run_path(str(ROOT / "docs" / "api.py"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]


def undocumented(name: str, thing: Any) -> list[str]:
    """``name`` and its public methods, where nothing is said of them or of what they override."""
    found = [] if inspect.getdoc(thing) else [name]
    if inspect.isclass(thing):
        own = {key: value for key, value in vars(thing).items() if not key.startswith("_")}
        callables = [key for key, value in own.items() if inspect.isfunction(value) or isinstance(value, property)]
        found += [f"{name}.{key}" for key in callables if not inspect.getdoc(getattr(thing, key))]
    return found


@pytest.mark.parametrize("module", ["raybsa", "raybsa.gradients", "raybsa.patterns"])
def test_every_public_name_has_a_docstring(module: str) -> None:
    package = importlib.import_module(module)
    found = [line for name in package.__all__ for line in undocumented(name, getattr(package, name))]
    assert not found


def test_the_check_sees_what_has_none() -> None:
    class Silent:
        def method(self) -> None: ...

    assert undocumented("Silent", Silent) == ["Silent", "Silent.method"]


def test_the_reference_has_a_page_with_every_public_name(tmp_path: Path) -> None:
    API["write"](tmp_path, ["raybsa"])
    page = (tmp_path / "raybsa.html").read_text()
    assert not [name for name in raybsa.__all__ if f'id="{name}"' not in page and f"raybsa/{name}.html" not in page]


def test_whatever_the_documents_import_has_a_page() -> None:
    imported = {name for text in TEXTS for name in re.findall(r"^from (raybsa[\w.]*) import", text.read_text(), re.M)}
    assert imported
    assert imported <= set(API["PAGES"])


def test_the_guide_to_the_results_names_columns_that_are_there_and_its_code_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (ROOT / "docs" / "reading-results.md").read_text()
    rows = [line.split("|")[1] for line in guide.splitlines() if line.startswith("| `")]
    columns = {field.name for field in fields(Record)}
    assert not [name for row in rows for name in re.findall(r"`([\w*]+)`", row) if not fnmatch.filter(columns, name)]
    store = Store.create(tmp_path / "results" / "search")
    store.write_series(curve("dense", "train_loss", 2.3))
    store.write_record(lm_record("dense", DENSE, 2.21, 40.0))
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(compile(block, "reading-results.md", "exec"), {})
    assert "forward_backward_ms_p50" in capsys.readouterr().out


def test_links_between_documents_lead_somewhere() -> None:
    for text in TEXTS:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text.read_text()):
            assert (text.parent / link).exists(), f"{text.name}: {link}"
