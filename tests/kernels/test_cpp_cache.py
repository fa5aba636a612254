"""Compiled code is saved whole or not at all, found again by the next process, and never loaded from a stranger."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raybsa import block_sparse_attention
from raybsa.kernels import cpp_build, cpp_cache
from tests.kernels.problems import PROBLEMS, needs_a_compiler

SOURCE = 'extern "C" int answer() { return 42; }\n'


class Kernels:
    """A folder as home, and a library that compiles in no time, in place of the kernels."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.temporary = home / "cache" / "raybsa", home / "tmp" / f"raybsa-{os.geteuid()}"
        (home / "tmp").mkdir()
        (home / "source").mkdir()
        (home / "source" / "answer.cpp").write_text(SOURCE)
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.cache.parent))
        monkeypatch.setattr(tempfile, "tempdir", str(home / "tmp"))
        monkeypatch.setattr(cpp_build, "SOURCE", home / "source")
        monkeypatch.setattr(cpp_build, "FLAGS", ("-shared", "-fPIC"))

    def load(self) -> int | str:
        """What the library answers, or why there is none; as a fresh process would ask."""
        cpp_build._library.cache_clear()
        return cpp_build.why_not() or int(cpp_build.library().answer())

    def files(self, folder: Path | None = None) -> list[Path]:
        return sorted((folder or self.cache).iterdir())


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kernels]:
    cpp_build._library.cache_clear()
    yield Kernels(tmp_path, monkeypatch)
    cpp_build._library.cache_clear()


def compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_build, "_compile", lambda *_: pytest.fail("compiled again"))


@needs_a_compiler
def test_it_is_compiled_once_for_all_processes(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.load() == 42
    (made,) = kernels.files()
    assert made.suffix == ".so"
    compiling_fails(monkeypatch)
    assert kernels.load() == 42


@needs_a_compiler
def test_threads_that_ask_at_one_time_compile_once(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_it, compiled, found = cpp_build._compile, [], []
    together = threading.Barrier(4)

    def counted(compiler: list[str], path: Path) -> None:
        compiled.append(path)
        compile_it(compiler, path)

    def ask() -> None:
        together.wait()
        found.append(cpp_build.why_not())

    monkeypatch.setattr(cpp_build, "_compile", counted)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [None] * 4
    assert len(compiled) == 1


@needs_a_compiler
def test_a_process_that_compiled_meanwhile_is_no_trouble(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_it = cpp_build._compile

    def another_was_faster(compiler: list[str], path: Path) -> None:
        monkeypatch.setattr(cpp_build, "_compile", compile_it)
        assert kernels.load() == 42
        compile_it(compiler, path)

    monkeypatch.setattr(cpp_build, "_ONE_AT_A_TIME", threading.RLock())
    monkeypatch.setattr(cpp_build, "_compile", another_was_faster)
    assert kernels.load() == 42
    assert all(cpp_cache._is_whole(path, path.name.rpartition("-")[0]) for path in kernels.files())


@needs_a_compiler
@pytest.mark.parametrize("length", [0, 200, -1], ids=["empty", "cut short", "its last byte is missing"])
def test_what_was_cut_short_is_compiled_anew_and_never_loaded(kernels: Kernels, length: int) -> None:
    assert kernels.load() == 42
    (made,) = kernels.files()
    whole = made.read_bytes()
    made.unlink()  # this process has it loaded: another file takes its name
    made.write_bytes(whole[:length])
    assert kernels.load() == 42
    assert whole in [path.read_bytes() for path in kernels.files()]


@needs_a_compiler
def test_what_was_altered_is_compiled_anew(kernels: Kernels) -> None:
    assert kernels.load() == 42
    (made,) = kernels.files()
    altered = made.read_bytes()[:-8] + b"altered!"
    made.unlink()
    made.write_bytes(altered)
    assert cpp_cache.find(kernels.cache, made.name.rpartition("-")[0]) is None
    assert kernels.load() == 42


@needs_a_compiler
@pytest.mark.parametrize("command", ["{}", "env '{}'", "'{}' -O1", "'{}' -DWORDS='two words'"])
@pytest.mark.parametrize("place", ["tools", "my tools"])
def test_cxx_is_a_program_or_one_with_arguments_whatever_its_path_and_language(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, place: str
) -> None:
    """As ``ccache g++``; what it says of its version may be in any encoding."""
    program = tmp_path / place / "compiler"
    program.parent.mkdir()
    program.write_bytes(b'#!/bin/sh\n[ "$1" = --version ] && printf "\\351\\377 1.0" && exit\nexec g++ "$@"\n')
    program.chmod(0o700)
    monkeypatch.setenv("CXX", command.format(program))
    assert cpp_build.why_no_compiler() is None
    assert kernels.load() == 42


@needs_a_compiler
def test_arguments_of_cxx_are_part_of_the_library_s_name(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("g++", "g++ -O1", ""):
        monkeypatch.setenv("CXX", command)
        assert kernels.load() == 42
    assert len(kernels.files()) == 2, "an empty CXX is none"


def test_torch_s_own_compiler_is_not_asked_with_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """``CXX="ccache g++"``: it would look for a program of that name, and raise deep inside."""
    monkeypatch.setenv("CXX", "env g++")
    layout, (q, k, v) = PROBLEMS[0].layout(), PROBLEMS[0].inputs(torch.float32)
    with pytest.raises(NotImplementedError, match="without arguments, got CXX='env g\\+\\+'"), torch.no_grad():
        block_sparse_attention(q, k, v, layout, backend="flex")


def test_a_cxx_that_is_no_command_is_told_as_it_stands(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "'g++")
    assert kernels.load() == 'needs a C++ compiler, and CXX is no command: No closing quotation, got "\'g++"'


@needs_a_compiler
def test_a_compiler_that_fails_leaves_nothing(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_build, "FLAGS", ("-no-such-flag",))
    assert "no-such-flag" in str(kernels.load())
    assert not kernels.files()


@needs_a_compiler
def test_a_cache_that_cannot_be_written_is_no_end(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a read-only image: the library is found there if it was made before, else saved in a temporary folder."""
    kernels.cache.parent.write_text("a file is no folder")
    assert kernels.load() == 42
    assert [path.suffix for path in kernels.files(kernels.temporary)] == [".so"]
    assert kernels.temporary.stat().st_mode & 0o777 == 0o700
    compiling_fails(monkeypatch)
    assert kernels.load() == 42


@needs_a_compiler
def test_without_any_home_it_is_saved_in_a_temporary_folder(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/does/not/count")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory")))
    with pytest.raises(FileNotFoundError, match="has no home folder"):
        cpp_cache.user_folder()
    assert kernels.load() == 42
    assert kernels.files(kernels.temporary)


@needs_a_compiler
def test_a_temporary_folder_that_others_may_enter_is_refused(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernels.cache.parent.write_text("a file is no folder")
    kernels.temporary.mkdir()
    kernels.temporary.chmod(0o770)
    wanted = f"{re.escape(str(kernels.temporary))} must be a folder of uid .*mode 700.*, got drwxrwx--- of uid"
    assert re.search(wanted, str(kernels.load()))
    kernels.temporary.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    kernels.temporary.symlink_to(tmp_path / "elsewhere")
    assert re.search("must be a folder of uid .*, got lrwxrwxrwx", str(kernels.load()))
    assert not list((tmp_path / "elsewhere").iterdir())
    assert "XDG_CACHE_HOME" in str(kernels.load()), "what helps"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_stranger_s_folder_and_file_are_refused(kernels: Kernels) -> None:
    kernels.temporary.mkdir(mode=0o700)
    os.chown(kernels.temporary, 54321, -1)
    with pytest.raises(PermissionError, match="of uid 54321"):
        cpp_cache.temporary_folder()
    path = cpp_cache.save(kernels.cache, "name", lambda path: path.write_text("code") and None)
    assert cpp_cache.find(kernels.cache, "name") == path
    os.chown(path, 54321, -1)
    assert cpp_cache.find(kernels.cache, "name") is None


HOMELESS = """
import os, sys, tempfile
{setup}
import torch
from raybsa.kernels import cpp_build, cpp_cache
from raybsa import BlockSparseBase
os.setuid(54321)
x = torch.ones(1, 1, 32, 16)
assert torch.allclose(BlockSparseBase(pattern="dense", block_size=16)(x, x, x), x)
print(cpp_build.why_not() or "built", oct(cpp_cache.temporary_folder().stat().st_mode & 0o777))
"""


@needs_a_compiler
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    "setup",
    [
        'os.environ.pop("HOME", None); os.environ.pop("XDG_CACHE_HOME", None)',
        'os.environ["HOME"] = "/nonexistent"; os.environ.pop("XDG_CACHE_HOME", None)',
        'os.environ["XDG_CACHE_HOME"] = "/root"',
    ],
    ids=["no HOME", "HOME that does not exist", "another user's XDG_CACHE_HOME"],
)
def test_a_user_id_without_a_home_computes(setup: str, tmp_path: Path) -> None:
    """As ``docker run --user 54321``: nothing that this user may write to but the temporary folder."""
    shared = Path(tempfile.mkdtemp())  # pytest's own folders let nobody else in
    shared.chmod(0o1777)
    try:
        done = subprocess.run(
            [sys.executable, "-c", HOMELESS.format(setup=setup)],
            env=os.environ | {"TMPDIR": str(shared)}, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert done.stdout.split() == ["built", "0o700"], done.stdout + done.stderr[-2000:]
    finally:
        shutil.rmtree(shared)


def test_where_nothing_can_be_saved_blocked_serves_and_cpp_says_why(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    layout, (q, k, v) = PROBLEMS[0].layout(), PROBLEMS[0].inputs(torch.float32)
    wanted = block_sparse_attention(q, k, v, layout, backend="blocked")
    cpp_build._library.cache_clear()
    assert torch.equal(block_sparse_attention(q, k, v, layout), wanted)
    with pytest.raises(NotImplementedError, match="XDG_CACHE_HOME says where they are cached"):
        block_sparse_attention(q, k, v, layout, backend="cpp")
