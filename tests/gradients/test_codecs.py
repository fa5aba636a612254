"""What is particular to one codec, and the catalog's errors."""

from __future__ import annotations

import pytest
import torch

from raybsa.comm import Communicator
from raybsa.gradients import State, build
from raybsa.gradients.orthonormal import gram_matrix, orthonormal
from raybsa.gradients.topk import largest
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("zip", {}, "unknown codec 'zip'; there are none, fp16, bf16, int8, topk, powersgd, or your own 'module:Name'"),
        ("none", {"rank": 3}, "codec none has no parameter rank; it has none"),
        ("topk", {"k": 3}, "codec topk has no parameter k; it has error_feedback, density"),
        ("topk", {"density": 0.0}, r"topk needs a density in \(0, 1\], got 0.0"),
        ("powersgd", {"rank": 0}, "powersgd needs a rank of at least 1, got 0"),
        ("powersgd", {"min_ratio": 0.5}, "powersgd needs a min_ratio of at least 1, got 0.5"),
        (
            "powersgd",
            {"wire": "int4"},
            r"powersgd travels as bfloat16, int8 or \(None\) as the gradient is, got 'int4'",
        ),
        ("int8", {"block_size": 1.5}, "int8 needs a block_size of at least 1 element, got 1.5"),
        ("int8", {"seed": -1}, "int8 needs a seed from 0, got -1"),
    ],
)
def test_build_says_what_was_wanted_and_what_came(name: str, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        build(name, **params)


def test_build_takes_a_name_a_dict_or_a_codec_and_nothing_else() -> None:
    codec = build("topk", density=0.5)
    assert build(codec) is codec
    assert build({"name": "topk", "params": {"density": 0.5}}) == codec
    with pytest.raises(ValueError, match=r"a codec's dict has the keys 'name' and 'params', got \['codec'\]"):
        build({"codec": "topk"})
    with pytest.raises(TypeError, match="a codec is a Codec, its spec's dict or a name, got 3"):
        build(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="parameters go with a name, got density beside"):
        build(codec, density=0.1)


def test_fp16_sends_what_is_too_large_as_inf_and_does_not_remember_it() -> None:
    codec, state = build("fp16"), State()
    assert codec.extract(codec.compress(torch.tensor([1e5, 1.0]), state)).tolist() == [torch.inf, 1.0]
    assert codec.extract(codec.compress(torch.tensor([2.0, 1.0]), state)).tolist() == [2.0, 1.0]


# ---- int8 ----------------------------------------------------------------------------------------------------------


def test_int8_rounds_right_on_average_and_is_off_by_less_than_a_scale() -> None:
    codec, state, x = build("int8", error_feedback=False), State(), torch.randn(256)
    sent = torch.stack([codec.extract(codec.compress(x, state)) for _ in range(400)])
    scale = x.abs().max() / 127
    assert (sent - x).abs().max() < 1.0001 * scale
    assert (sent.mean(0) - x).abs().max() < 4 * scale / 2 / 400**0.5


def test_int8_draws_differ_by_tensor_rank_and_step_and_repeat() -> None:
    codec, x = build("int8"), torch.randn(1000)
    levels = [codec.compress(x, State(*words)).tensors[1] for words in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert all(not torch.equal(levels[0], other) for other in levels[1:])
    assert torch.equal(levels[0], codec.compress(x, State()).tensors[1])


def test_int8_keeps_what_is_not_finite_within_its_block() -> None:
    x = torch.randn(600)
    x[300] = torch.inf
    back = build("int8", block_size=256).extract(build("int8", block_size=256).compress(x, State()))
    assert (~back.isfinite()).nonzero().view(-1).tolist() == list(range(256, 512))


# ---- top-k ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("numel", "density", "count"), [(1000, 0.01, 10), (10, 0.01, 1), (1, 1.0, 1), (0, 0.5, 0)])
def test_topk_sends_exactly_k(numel: int, density: float, count: int) -> None:
    codec = build("topk", density=density)
    values, index = codec.compress(torch.ones(numel), State()).tensors
    assert values.shape == index.shape == (count,)
    assert index.tolist() == list(range(count)), "of equal elements the first"


def test_topk_takes_the_largest_and_of_equal_ones_the_first() -> None:
    x = torch.randint(-4, 5, (5000,)).float()
    for count in (1, 7, 1000, 4999, 5000):
        wanted = sorted(range(5000), key=lambda i: (-abs(float(x[i])), i))[:count]
        assert largest(x, count).tolist() == sorted(wanted)


def test_topk_of_ranks_that_choose_different_elements_puts_each_where_it_belongs() -> None:
    def work(communicator: Communicator) -> torch.Tensor:
        x = torch.zeros(6)
        x[communicator.rank] = 1.0 + communicator.rank
        x[5] = 0.5
        return build("topk", density=1 / 6).exchange([x], [State()], communicator)[0]

    for total in run_ranks(3, work):
        assert total.tolist() == [1.0, 2.0, 3.0, 0.0, 0.0, 0.0]


# ---- PowerSGD ------------------------------------------------------------------------------------------------------


def test_powersgd_is_the_projection_of_the_paper() -> None:
    """One step from a given start, written out with QR: P P^T times the sum of the ranks' matrices."""
    matrices = [torch.randn(40, 60, dtype=torch.float64) for _ in range(2)]
    start = torch.randn(60, 3, dtype=torch.float64)

    def work(communicator: Communicator) -> tuple[torch.Tensor, torch.Tensor | None]:
        state = State(memory={"start": start})
        total = build("powersgd", rank=3).exchange([matrices[communicator.rank]], [state], communicator)[0]
        return total, state.residual

    basis = torch.linalg.qr(sum(matrices) @ start).Q
    for rank, (total, residual) in enumerate(run_ranks(2, work)):
        torch.testing.assert_close(total, basis @ basis.mT @ sum(matrices), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(residual, matrices[rank] - basis @ basis.mT @ matrices[rank], rtol=1e-9, atol=1e-9)


def test_powersgd_sends_a_matrix_of_its_rank_exactly() -> None:
    x = torch.randn(50, 2, dtype=torch.float64) @ torch.randn(2, 70, dtype=torch.float64)
    back = build("powersgd", rank=2).extract(build("powersgd", rank=2).compress(x, State()))
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)


def test_powersgd_gets_better_from_a_warm_start() -> None:
    x = torch.randn(80, 80) @ torch.diag(0.9 ** torch.arange(80.0)) @ torch.randn(80, 80)
    codec, state = build("powersgd", rank=4, error_feedback=False), State()
    errors = [float((codec.extract(codec.compress(x, state)) - x).norm()) for _ in range(6)]
    best = float(torch.linalg.svdvals(x)[4:].norm())
    assert errors[-1] < errors[0]
    assert best * 0.999 <= errors[-1] < 1.05 * best, f"{errors} should near the best of rank 4, {best:.2f}"


def test_powersgd_sends_vectors_and_small_matrices_as_they_are() -> None:
    codec = build("powersgd", rank=4)
    for shape in [(1000,), (8, 8), (16, 15), ()]:
        x = torch.randn(shape)
        payload = codec.compress(x, State())
        assert len(payload.tensors) == 1
        assert torch.equal(codec.extract(payload), x), shape
    assert codec.nbytes(codec.compress(torch.randn(16, 16), State())) == 4 * 4 * (16 + 16)


def test_powersgd_finds_its_way_back_after_gradients_of_zero() -> None:
    x = torch.randn(40, 3) @ torch.randn(3, 40)
    codec, state = build("powersgd", rank=3), State()
    for _ in range(2):
        assert not codec.extract(codec.compress(torch.zeros(40, 40), state)).any()
    torch.testing.assert_close(codec.extract(codec.compress(x, state)), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e12])
def test_orthonormal_columns_span_what_came(scale: float) -> None:
    x = scale * torch.randn(700, 5) @ torch.diag(torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4]))
    basis = orthonormal(x).double()
    torch.testing.assert_close(basis.mT @ basis, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)
    left = x.double() - basis @ (basis.mT @ x.double())
    assert (left.norm(dim=0) <= 1e-6 * x.double().norm(dim=0)).all()


def test_columns_that_depend_on_others_never_grow() -> None:
    x = torch.randn(700, 2) @ torch.randn(2, 5)
    assert torch.linalg.svdvals(orthonormal(x).double()).max() < 1 + 1e-6
    assert not orthonormal(torch.zeros(700, 5)).any()
    assert orthonormal(torch.full((700, 5), torch.inf)).isnan().all()


def test_the_gram_matrix_is_summed_as_a_tree_of_256_rows_at_a_time() -> None:
    """Its first level adds the two halves, so swapping them changes no bit; it would in a sum from first to last."""
    x = torch.randn(256 * 8, 12, dtype=torch.float64)
    first, second = x.chunk(2)
    assert torch.equal(gram_matrix(x), gram_matrix(torch.cat([second, first])))
    torch.testing.assert_close(gram_matrix(x[:1000]), x[:1000].mT @ x[:1000])


def test_the_same_bits_come_from_any_number_of_threads() -> None:
    x, before = torch.randn(20_000, 16), torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            basis = orthonormal(x)
            made.append((basis, basis @ x[:300].mT))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))
