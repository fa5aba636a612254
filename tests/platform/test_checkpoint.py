"""Checkpoints are whole or not there; torn and foreign ones are passed over with their reason."""

from pathlib import Path

import pytest
import torch

from raybsa.cluster.checkpoint import Checkpoint, CheckpointFolder, folder_for


def checkpoint(step: int, question: str = "q") -> Checkpoint:
    return Checkpoint(step, question, [torch.full((2, 2), float(step)), torch.tensor(float(step))])


@pytest.mark.parametrize("as_uri", [False, True], ids=["path", "uri"])
def test_the_newest_comes_back_and_the_oldest_go(tmp_path: Path, as_uri: bool) -> None:
    folder = CheckpointFolder(f"file://{tmp_path}/c" if as_uri else str(tmp_path / "c"), keep=2)
    assert folder.latest("q") is None
    for step in (10, 20, 30):
        folder.save(checkpoint(step))
    assert folder.steps() == [20, 30]
    newest = folder.latest("q")
    assert newest is not None
    assert newest.step == 30
    assert torch.equal(newest.state[0], torch.full((2, 2), 30.0))
    assert [path.suffix for path in (tmp_path / "c").iterdir()] == [".ckpt"] * 2, "no temporary file stays"


def test_a_torn_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path))
    folder.save(checkpoint(10))
    folder.save(checkpoint(20))
    newest = tmp_path / "step-000000020.ckpt"
    newest.write_bytes(newest.read_bytes()[:-7])
    said: list[str] = []
    found = folder.latest("q", said.append)
    assert found is not None
    assert found.step == 10
    assert len(said) == 1
    assert "step-000000020.ckpt is passed over: it is torn" in said[0]


def test_a_checkpoint_of_another_question_is_not_taken(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path))
    folder.save(checkpoint(10, "other"))
    said: list[str] = []
    assert folder.latest("q", said.append) is None
    assert "it belongs to question other, not to q" in said[0]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="keep must be at least 1"):
        CheckpointFolder("x", keep=0)
    with pytest.raises(ValueError, match=r"must go to a local path or a pyarrow\.fs URI, got 'nowhere://x'"):
        CheckpointFolder("nowhere://x")


def test_what_an_earlier_training_left_does_not_push_out_a_new_checkpoint(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), keep=2)
    for step in (150, 200):
        folder.save(checkpoint(step, "another question"))
    for step in (50, 60, 70):
        folder.save(checkpoint(step))
    assert folder.steps() == [60, 70, 150, 200]
    found = folder.latest("q", lambda text: None)
    assert found is not None
    assert found.step == 70


def test_what_a_writer_that_died_left_half_written_goes(tmp_path: Path) -> None:
    (tmp_path / f".{'0a' * 16}.tmp").write_bytes(b"half")
    (tmp_path / ".hidden.tmp").write_bytes(b"another's")
    CheckpointFolder(str(tmp_path)).save(checkpoint(10))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden.tmp", "step-000000010.ckpt"]


def test_what_an_earlier_run_left_is_only_taken_by_one_that_resumes(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), keep=3)
    for step, run in ((10, "now"), (20, "before")):
        folder.save(Checkpoint(step, "q", [torch.zeros(1)], run))
    said: list[str] = []
    own, newest = folder.latest("q", said.append, run="now"), folder.latest("q")
    assert own is not None
    assert newest is not None
    assert (own.step, newest.step) == (10, 20)
    assert "step-000000020.ckpt is passed over: an earlier run left it" in said[0]


def test_a_training_never_writes_over_the_checkpoints_of_another(tmp_path: Path) -> None:
    root, said = str(tmp_path / "checkpoints"), list[str]()
    assert folder_for(root, "q", "first", resume=False, say=said.append) == root
    CheckpointFolder(root).save(checkpoint(10))
    again = folder_for(root, "q", "second", resume=False, say=said.append)
    other = folder_for(root, "another question", "third", resume=True, say=said.append)
    assert [again, other] == [f"{root}/second", f"{root}/third"]
    assert f"checkpoints go to {root}/second: those of another training in {root} stay as they are" in said
    CheckpointFolder(other).save(checkpoint(30, "another question"))
    CheckpointFolder(again).save(checkpoint(20))
    assert folder_for(root, "q", "fourth", resume=True, say=said.append) == again, "it has the newest"
    assert folder_for(root, "another question", "fifth", resume=True, say=said.append) == other
