"""Text: real bytes, split by file in the same way everywhere."""

import os

import pytest
import torch

from dashboards.written import write_page
from raybsa.results.store import Store
from raybsa.spec import AttentionSpec, TrialSpec
from raybsa.tasks.byte_lm import ByteText, about_its_text
from raybsa.tasks.text import is_held_out, load_corpus


@pytest.fixture(autouse=True)
def forgotten():
    """A text is read once in a process; here it changes."""
    load_corpus.cache_clear()


def folder_of(tmp_path, count):
    """Files whose contents name them, so that a split can be read off the bytes."""
    for i in range(count):
        path = tmp_path / f"part{i % 3}" / f"{i:03d}.txt"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f"<part{i % 3}/{i:03d}.txt>")
    return str(tmp_path)


def names_in(part):
    return set(bytes(part.tolist()).decode().strip("<>").split("><"))


def test_every_file_is_on_the_side_that_the_hash_of_its_relative_path_says(tmp_path):
    corpus = load_corpus(folder_of(tmp_path / "a", 60))
    train, held_out = names_in(corpus.train), names_in(corpus.held_out)
    assert len(train) + len(held_out) == 60
    assert held_out == {name for name in train | held_out if is_held_out(name)}
    assert 1 <= len(held_out) <= 15


def test_the_split_does_not_depend_on_where_the_folder_lies(tmp_path):
    one, two = load_corpus(folder_of(tmp_path / "a", 60)), load_corpus(folder_of(tmp_path / "b" / "c", 60))
    assert one.train.equal(two.train)
    assert one.held_out.equal(two.held_out)


def test_a_single_file_holds_out_its_last_tenth(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(100)))
    corpus = load_corpus(str(path))
    assert corpus.train.tolist() == list(range(90))
    assert corpus.held_out.tolist() == list(range(90, 100))


def test_hidden_files_are_not_read(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "open.txt").write_text("o" * 20)
    corpus = load_corpus(str(tmp_path))
    assert set(corpus.train.tolist()) == set(corpus.held_out.tolist()) == {ord("o")}


def test_by_default_it_is_the_standard_library():
    corpus = load_corpus()
    assert len(corpus.train) > 5_000_000
    assert len(corpus.train) > 5 * len(corpus.held_out) > 0
    assert b"class OrderedDict" in bytes(corpus.train.numpy()) + bytes(corpus.held_out.numpy())


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.write_text("")], ids=["empty folder", "empty file"])
def test_text_without_a_byte_is_refused(tmp_path, make):
    make(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"must hold some bytes, got '.*nothing'"):
        load_corpus(str(tmp_path / "nothing"))


def test_text_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"file or a folder, got '.*missing', which does not exist"):
        load_corpus(str(tmp_path / "missing"))


def test_results_that_lie_among_the_text_are_no_text(tmp_path):
    (tmp_path / "mine.txt").write_text("m" * 50)
    alone = load_corpus(str(tmp_path)).digest
    store = Store.create(tmp_path / "results", adopt=False)
    store.write_file("front/01/best.json", b'{"ours": true}')
    (tmp_path / "results" / "records" / "odd.txt").write_text("ours too")
    write_page("<!doctype html>ours", str(tmp_path / "results" / "report.html"))
    write_page("<!doctype html>ours", str(tmp_path / "page.html"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\x00\x01")
    load_corpus.cache_clear()
    corpus = load_corpus(str(tmp_path))
    assert corpus.digest == alone
    assert "1 files, 50 bytes" in corpus.told
    assert "5 of results, 1 binary" in corpus.told
    (tmp_path / "results" / "notes.txt").write_text("n" * 50)
    load_corpus.cache_clear()
    assert "2 files, 100 bytes" in load_corpus(str(tmp_path)).told, "what a user puts there is theirs"


def test_results_of_a_version_without_marks_are_no_text_either(tmp_path):
    for name in ("mine.txt", "out/series/x", "out/records/a.parquet", "out/front/01/best.json", "out/report.html"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert "1 files, 8 bytes" in load_corpus(str(tmp_path)).told


def test_links_are_followed_each_folder_once_and_told(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "text.txt").write_text("t" * 40)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "linked").symlink_to(tmp_path / "real")
    (corpus / "again").symlink_to(tmp_path / "real")
    (corpus / "round").symlink_to(corpus)
    (corpus / "gone.txt").symlink_to(tmp_path / "nowhere")
    found = load_corpus(str(corpus))
    assert len(found.train) + len(found.held_out) == 40
    assert "3 links followed; left out: 2 links to folders that were read, 1 links to nothing" in found.told


def test_a_name_that_is_no_utf8_is_read_and_told_in_escapes(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/r\xe9sum\xe9.txt", "wb") as file:
        file.write(b"x" * 40)
    corpus = load_corpus(os.fsdecode(folder))
    assert "1 files, 40 bytes" in corpus.told
    assert "caf\\xe9" in corpus.told
    corpus.told.encode("utf-8")


def test_a_changed_text_is_another_question_and_the_old_one_is_not_answered_with_it(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("a" * 2000)
    asked = TrialSpec("byte_lm", (AttentionSpec("dense"),), train_len=64, task_params={"text": str(path)})
    before = about_its_text(asked, lambda text: None)
    path.write_text("b" * 2000)
    load_corpus.cache_clear()
    after = about_its_text(asked, lambda text: None)
    assert before.digest != after.digest
    with pytest.raises(ValueError, match=r"book\.txt has changed since the question was asked .* another question"):
        ByteText(before, torch.device("cpu"))
    ByteText(after, torch.device("cpu"))
