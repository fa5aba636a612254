"""The counter-based hash against lowbias32 written out with Python integers."""

import itertools
import math

import pytest
import torch

from raybsa.counter import Stream, hash_u32, normal, uniform


def lowbias32(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> shift
        x = x * factor % 2**32
    return x ^ (x >> 16)


def chained(*words):
    state = 0
    for word in words:
        state = lowbias32(state ^ word % 2**32)
    return state


def test_the_finaliser_is_lowbias32():
    assert lowbias32(0) == 0
    assert len({lowbias32(x) for x in range(10_000)}) == 10_000


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1, 2**40 + 7, -1])
@pytest.mark.parametrize("stream", list(Stream))
def test_numbers_are_the_chained_words(seed, stream):
    words = [(0, 0), (1, 0), (0, 1), (7, 2**31), (2**32 - 1, 3)]
    a, b = torch.tensor(words).unbind(1)
    expected = [chained(seed, stream, *pair) for pair in words]
    assert hash_u32(seed, stream, a, b).tolist() == expected
    assert uniform(seed, stream, a, b).tolist() == [(number >> 8) / 2**24 for number in expected]


def test_known_numbers_stay_what_they_are():
    """Layouts, dropout and synthetic tensors of earlier records depend on them."""
    assert hash_u32(0, Stream.LAYOUT, torch.arange(3)).tolist() == [chained(0, 1, i) for i in range(3)]
    assert hash_u32(0, Stream.LAYOUT, torch.arange(3)).tolist() == [1492470133, 3529208806, 3405767568]


def test_counters_broadcast_in_any_integer_type():
    rows, cols = torch.arange(4, dtype=torch.int32)[:, None], torch.arange(5, dtype=torch.uint8)
    made = hash_u32(3, Stream.DROPOUT, rows, cols)
    assert made.dtype == torch.int64
    assert made.tolist() == [[chained(3, Stream.DROPOUT, i, j) for j in range(5)] for i in range(4)]


def test_numbers_are_made_where_the_counters_are():
    counters = (torch.arange(4, device="meta")[:, None], torch.arange(3, device="meta"))
    for draw in (hash_u32, uniform, normal):
        made = draw(1, Stream.KEY, *counters)
        assert made.device.type == "meta"
        assert made.shape == (4, 3)
    with torch.device("meta"):  # and not where a default says
        counter = torch.arange(3, device="cpu")
        assert normal(1, Stream.KEY, counter).device.type == "cpu"


@pytest.mark.gpu
def test_a_gpu_makes_the_same_numbers():
    counter = torch.arange(10_000)
    made = hash_u32(5, Stream.VALUE, counter.cuda(), counter.cuda() * 3)
    assert made.cpu().equal(hash_u32(5, Stream.VALUE, counter, counter * 3))
    assert uniform(5, Stream.VALUE, counter.cuda()).cpu().equal(uniform(5, Stream.VALUE, counter))


def test_uniform_numbers_are_uniform():
    made = uniform(11, Stream.TASK, torch.arange(1 << 17)).double()
    assert made.min() >= 0.0
    assert made.max() < 1.0
    counts = torch.bincount((made * 256).long(), minlength=256).double()
    chi_square = float(((counts - 512) ** 2 / 512).sum())  # 255 degrees of freedom: mean 255, deviation 22.6
    assert 255 - 5 * 22.6 < chi_square < 255 + 5 * 22.6
    pairs = made[:-1] - 0.5, made[1:] - 0.5
    assert abs(float((pairs[0] * pairs[1]).mean()) * 12) < 5 / math.sqrt(1 << 17), "neighbours are not correlated"


def test_every_bit_is_fair():
    made = hash_u32(2, Stream.QUERY, torch.arange(1 << 16))
    for bit in range(32):
        share = float((made >> bit & 1).double().mean())
        assert abs(share - 0.5) < 5 * 0.5 / 256


def test_normal_numbers_have_the_moments_of_a_normal_distribution():
    made = normal(4, Stream.QUERY, torch.arange(1 << 17)).double()
    assert made.isfinite().all()
    error = 5 / math.sqrt(1 << 17)
    assert abs(float(made.mean())) < error
    assert abs(float(made.var()) - 1) < error * math.sqrt(2)
    assert abs(float((made**4).mean()) - 3) < error * math.sqrt(96)
    assert abs(float((made.abs() < 1).double().mean()) - math.erf(math.sqrt(0.5))) < error


def test_streams_and_seeds_share_no_numbers():
    counter = torch.arange(4096)
    made = [uniform(seed, stream, counter).double() - 0.5 for seed in (0, 1) for stream in Stream]
    for a, b in itertools.combinations(made, 2):
        assert abs(float((a * b).mean()) * 12) < 5 / math.sqrt(4096), "streams are not correlated"
