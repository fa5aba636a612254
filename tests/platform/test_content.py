"""Digests of what a question only names: what differs is another question."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raybsa import content
from raybsa.content import asked_now, code_digest, file_digest
from raybsa.experiments.history import asked_otherwise, history
from raybsa.experiments.recording import Run, record_of
from raybsa.experiments.space import SearchSpace
from raybsa.layout import BlockLayout
from raybsa.patterns.blocks import save_blocks
from raybsa.results.record import Outcome, Record
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks.question import digest_of

OWN = """
from beside import HALF
from raybsa.patterns.sliding_window import SlidingWindow

class Mine(SlidingWindow):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "content_own.py").write_text(OWN)
    (tmp_path / "beside.py").write_text("HALF = 2")
    (tmp_path / "not_imported.py").write_text("x = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    return tmp_path


def forget() -> None:
    """As a new process."""
    code_digest.cache_clear()
    file_digest.cache_clear()


def record(spec: TrialSpec) -> Record:
    return record_of(Outcome(spec, None, None, 0), Run("run", "test"), f"run-{spec.digest}")


@pytest.mark.parametrize("name", ["content_own:Mine", "FOLDER/content_own.py:Mine"])
def test_code_has_the_digest_of_its_file_and_of_what_that_imports_from_beside_it(folder: Path, name: str) -> None:
    name = name.replace("FOLDER", str(folder))
    first = code_digest(name)
    (folder / "not_imported.py").write_text("x = 2")
    forget()
    assert code_digest(name) == first != ""
    (folder / "beside.py").write_text("HALF = 3")
    forget()
    second = code_digest(name)
    (folder / "content_own.py").write_text(OWN + "# changed")
    forget()
    assert len({first, second, code_digest(name)}) == 3


def test_code_that_is_not_there_has_none(folder: Path) -> None:
    assert [code_digest(name) for name in ("no_such_module:Mine", f"{folder}/none.py:Mine")] == ["", ""]


def test_only_an_attention_that_names_something_carries_a_digest_and_its_arguments_never_do(folder: Path) -> None:
    plain = AttentionSpec(pattern=PatternSpec("random"), density=0.1)
    own = AttentionSpec(pattern=PatternSpec("content_own:Mine"), density=0.1)
    mixed = AttentionSpec(pattern=PatternSpec("union", {"parts": [{"name": "content_own:Mine"}]}))
    assert asked_now(plain) is plain
    assert "content" not in plain.to_dict()
    for attention in (own, mixed):
        asked = asked_now(attention)
        assert AttentionSpec.from_dict(asked.to_dict()) == asked != attention
        assert "content" not in asked.factory_arguments(True)


def test_a_file_of_blocks_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "blocks.parquet"
    digests = []
    for kept in (1, 2):
        mask = torch.eye(4, dtype=torch.bool)
        mask[3, :kept] = True
        layout = BlockLayout.from_dense(mask, q_len=64, kv_len=64, q_block_size=16, kv_block_size=16, causal=True)
        save_blocks(layout, path)
        forget()
        digests.append(asked_now(AttentionSpec(pattern=PatternSpec("blocks", {"path": str(path)}))).content)
    assert digests[0] != digests[1]


def test_what_was_asked_with_other_code_or_data_is_another_question_and_is_counted(folder: Path) -> None:
    base = TrialSpec("byte_lm", (AttentionSpec("dense"),), content={"text": "now"})
    space = SearchSpace(base, {"random": {}, "content_own:Mine": {}}, block_sizes=(16,))
    asked = [space.spec(point) for point in space.first_points()]
    rows = [record(spec) for spec in asked]
    assert len(history(space, rows)) == 3
    assert asked_otherwise(space, rows) == 0
    (folder / "content_own.py").write_text(OWN + "# changed")
    forget()
    assert [answered.spec for answered in history(space, rows)] == asked[:2], "the own pattern's is another"
    assert asked_otherwise(space, rows) == 1
    for then in ({"text": "then"}, {}):
        old = [record(replace(spec, content=then)) for spec in asked[:2]]
        assert history(space, old) == []
        assert asked_otherwise(space, [*old, record(replace(asked[0], train_steps=7))]) == 2
    assert content.asked_now(asked[0].layer(0)) == asked[0].layer(0)


def test_a_question_without_content_is_the_question_that_it_was() -> None:
    spec = TrialSpec("byte_lm", (AttentionSpec("dense"),))
    assert "content" not in spec.to_dict()
    assert TrialSpec.from_dict(replace(spec, content={"text": "a"}).to_dict()).content == {"text": "a"}


def test_batches_have_the_digest_of_their_values() -> None:
    batches = [(torch.arange(4), {"mask": torch.ones(2, dtype=torch.bool)}), [torch.zeros(3, dtype=torch.bfloat16)]]
    same = [(torch.arange(4), {"mask": torch.ones(2, dtype=torch.bool)}), [torch.zeros(3, dtype=torch.bfloat16)]]
    assert digest_of(batches) == digest_of(same)
    same[0][0][1] = 7
    assert digest_of(batches) != digest_of(same)
