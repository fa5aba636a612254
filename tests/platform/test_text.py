"""Text: real bytes, split by file in the same way everywhere."""

import pytest

from raybsa.tasks.text import is_held_out, load_corpus


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
