"""The C++ kernels equal the float64 reference, however they are compiled, and say why where they cannot run."""

from __future__ import annotations

import platform
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raybsa import BlockLayout, block_sparse_attention
from raybsa.kernels import cpp, cpp_build
from raybsa.kernels.api import choose_backend, run_call
from raybsa.kernels.backward import attention_backward
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.delta import row_delta
from tests.kernels.problems import PROBLEMS, Problem, needs_a_compiler, outputs_and_gradients, relative_error

SERVED = [replace(p, head_dim=48) if p.head_dim % cpp.HEAD_DIM_STEP else p for p in PROBLEMS]
WIDE = [
    Problem(f"head-dim-{n}", causal=True, kind="window", head_dim=n, q_len=77, kv_len=77) for n in (32, 64, 80, 256)
]
TALL = [Problem("blocks-of-128", q_block=128, kv_block=128, q_len=200, kv_len=200, kind="dense", causal=True)]


@pytest.fixture
def built_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache and temporary folder; the library of this process is forgotten, before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cpp_build._library.cache_clear()
    yield tmp_path / "raybsa"
    cpp_build._library.cache_clear()


def assert_equals_reference(problem: Problem, layout: BlockLayout | None = None) -> None:
    layout, inputs = layout or problem.layout(), problem.inputs(torch.float32)
    grad_out = torch.randn(*inputs[0].shape[:2], inputs[0].shape[3], problem.q_len).transpose(2, 3)  # strided
    grad_lse = torch.randn(inputs[0].shape[:3])
    got = outputs_and_gradients(inputs, layout, grad_out, grad_lse, backend="cpp")
    wide = [x.double() for x in inputs]
    wanted = outputs_and_gradients(wide, layout, grad_out.double(), grad_lse.double(), backend="reference")
    assert got.keys() == wanted.keys()
    for name in wanted:
        error = relative_error(got[name], wanted[name])
        assert error <= (1e-4 if "grad" in name else 1e-5), f"{name}: relative error {error:.2e}"


@needs_a_compiler
@pytest.mark.parametrize("problem", [*SERVED, *WIDE, *TALL], ids=lambda p: p.name)
def test_cpp_equals_the_reference(problem: Problem) -> None:
    assert_equals_reference(problem)


@needs_a_compiler
@pytest.mark.parametrize("architecture", ["x86-64", "x86-64-v3"])
def test_narrower_vectors_equal_the_reference(
    architecture: str, built_anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("other vectors than this machine's are compiled for x86-64 alone")
    flags = tuple(f"-march={architecture}" if flag.startswith("-march") else flag for flag in cpp_build.FLAGS)
    monkeypatch.setattr(cpp_build, "FLAGS", flags)
    for problem in (SERVED[1], SERVED[2], SERVED[6], WIDE[2], TALL[0]):
        assert_equals_reference(problem)


@needs_a_compiler
@pytest.mark.parametrize("threads", [3, 4])
def test_threads_that_share_a_head_s_rows_change_nothing_but_the_order_of_sums(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert_equals_reference(replace(SERVED[6], batch=1, groups=4))


@needs_a_compiler
def test_repeats_are_equal_bit_by_bit() -> None:
    problem = SERVED[6]
    layout, inputs = problem.layout(), problem.inputs(torch.float32)
    grad_out, grad_lse = torch.randn_like(inputs[0]), torch.randn(inputs[0].shape[:3])
    first, second = (outputs_and_gradients(inputs, layout, grad_out, grad_lse, backend="cpp") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_a_compiler
def test_tensors_are_read_by_their_strides() -> None:
    problem = Problem("strided", causal=True)
    layout = problem.layout()
    fused = torch.randn(2, 128, 3, 4, 16)  # (batch, tokens, q k v, heads, head_dim), as a fused projection leaves it
    q, k, v = (x.transpose(1, 2) for x in fused.unbind(2))
    backwards = torch.randn(2, 4, 16, 128).transpose(2, 3)  # a token's numbers lie apart
    for values in (v, backwards):
        got = block_sparse_attention(q, k, values, layout, backend="cpp")
        wanted = block_sparse_attention(q.double(), k.double(), values.double(), layout, backend="reference")
        assert relative_error(got, wanted) <= 1e-5


@needs_a_compiler
def test_a_part_of_the_keys_is_differentiated_by_the_whole_rows_lse() -> None:
    problem = Problem("part", batch=1, heads=2, kv_heads=1, groups=2, q_len=70, kv_len=70, causal=True)
    layout, (q, k, v) = problem.layout(), problem.inputs(torch.float32)
    whole = AttentionCall(q, k, v, layout, 0.25, None, None, None, 0.0, None, True, True)
    out, lse = run_call(whole, "cpp")
    grad_out = torch.randn_like(out)
    parts = [layout.select(None, keys) for keys in (torch.tensor([0, 2]), torch.tensor([1]))]
    places = [torch.cat([torch.arange(32), torch.arange(64, 70)]), torch.arange(32, 64)]
    calls = [replace(whole, k=k[:, :, x], v=v[:, :, x], layout=part) for part, x in zip(parts, places, strict=True)]
    delta = row_delta(out, grad_out)
    found = [attention_backward(call, lse, delta, grad_out, backend="cpp") for call in calls]
    wanted = attention_backward(whole, lse, delta, grad_out, backend="blocked")
    assert relative_error(found[0][0] + found[1][0], wanted[0]) <= 1e-5
    for index in (1, 2):
        for gradient, place in zip((x[index] for x in found), places, strict=True):
            assert relative_error(gradient, wanted[index][:, :, place]) <= 1e-5


@needs_a_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_shows_in_the_output(bad: float) -> None:
    problem = Problem("dense", kind="dense")
    q, k, v = problem.inputs(torch.float32)
    k[0, 1, 5] = bad
    got = block_sparse_attention(q, k, v, problem.layout(), backend="cpp")
    assert got[0, 1].isnan().any(-1).all()
    assert got[1].isfinite().all()


@needs_a_compiler
def test_auto_takes_cpp_where_it_can_and_it_says_what_it_cannot() -> None:
    problem = PROBLEMS[0]
    q, k, v = problem.inputs(torch.float32)
    call = AttentionCall(q, k, v, problem.layout(), 1.0, None, None, None, 0.0, None, False, False)
    assert choose_backend(call) == "cpp"
    refused = {
        "float32": replace(call, q=q.double(), k=k.double(), v=v.double()),
        "multiple of 16": replace(call, q=q[..., :8], k=k[..., :8], v=v[..., :8]),
        "no attn_mask": replace(call, attn_mask=torch.ones(128, 128, dtype=torch.bool)),
        "no segment_ids": replace(call, segment_ids=(torch.zeros(2, 128), torch.zeros(2, 128))),
        "no block_bias": replace(call, block_bias=torch.zeros(call.layout.nnz_blocks)),
        "no dropout": replace(call, dropout_p=0.5),
    }
    for word, other in refused.items():
        assert word in (cpp.why_not(other) or "")
        assert choose_backend(other) == "blocked"


def test_without_a_compiler_blocked_serves_and_cpp_says_what_is_missing(
    built_anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    problem = PROBLEMS[0]
    q, k, v = problem.inputs(torch.float32)
    with pytest.raises(NotImplementedError, match="needs a C\\+\\+ compiler, and there is no 'no-such-compiler'"):
        block_sparse_attention(q, k, v, problem.layout(), backend="cpp")
    assert block_sparse_attention(q, k, v, problem.layout()).isfinite().all()


@needs_a_compiler
def test_what_the_compiler_says_is_told(built_anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_build, "FLAGS", ("-no-such-flag",))
    assert "no-such-flag" in (cpp_build.why_not() or "")


def test_the_compiler_s_version_is_part_of_the_library_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["one", "two"])

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, stdout=next(said))

    monkeypatch.setattr(cpp_build.subprocess, "run", run)
    assert cpp_build._digest(["g++"]) != cpp_build._digest(["g++"])
