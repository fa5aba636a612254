"""FlexAttention through our adapter equals the reference where it can serve the call."""

import pytest
import torch

from raybsa import block_sparse_attention
from tests.kernels.problems import Problem, needs_a_compiler, outputs_and_gradients, relative_error

CPU_PROBLEMS = [
    Problem("gqa-causal-ragged", causal=True, kv_heads=2, groups=4, q_len=250, kv_len=250),
    Problem("unequal-blocks-cross", q_block=32, kv_block=64, q_len=130, kv_len=250),
]
CUDA_PROBLEMS = [
    Problem("block-128", q_len=640, kv_len=640, q_block=128, kv_block=128, head_dim=64),
    Problem("per-head-causal-ragged", "random", True, 2, 4, 2, 600, 600, 128, 128, 4, 64),
]


@needs_a_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("problem", CPU_PROBLEMS, ids=lambda p: p.name)
def test_compiled_flex_on_the_cpu_equals_the_reference(problem: Problem) -> None:
    layout, (q, k, v) = problem.layout(), problem.inputs(torch.float32)
    got = block_sparse_attention(q, k, v, layout, backend="flex")
    wanted = block_sparse_attention(q.double(), k.double(), v.double(), layout, backend="reference")
    assert relative_error(got, wanted) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("problem", CUDA_PROBLEMS, ids=lambda p: p.name)
def test_flex_on_cuda_equals_the_reference_forward_and_backward(problem: Problem) -> None:
    layout, inputs = problem.layout("cuda"), problem.inputs(torch.bfloat16, "cuda")
    grad_out = torch.randn_like(inputs[0])
    grad_lse = torch.randn(inputs[0].shape[:3], device="cuda")
    wide = [x.double() for x in inputs]
    wanted = outputs_and_gradients(wide, layout, grad_out.double(), grad_lse.double(), backend="reference")
    got = outputs_and_gradients(inputs, layout, grad_out, grad_lse, backend="flex")
    for name, value in wanted.items():
        assert relative_error(got[name], value) <= 2e-2, name
