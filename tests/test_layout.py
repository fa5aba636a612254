"""BlockLayout against dense boolean masks made in the test."""

import dataclasses

import pytest
import torch

from raybsa.layout import BlockLayout

SHAPES = {  # q_len, kv_len, q_block_size, kv_block_size
    "square": (64, 64, 8, 8),
    "ragged": (61, 61, 8, 8),
    "more_keys": (40, 75, 8, 16),
    "more_queries": (75, 40, 16, 8),
    "large_q_blocks": (70, 66, 32, 4),
    "one_block": (3, 5, 8, 8),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
both_causalities = pytest.mark.parametrize("causal", [False, True], ids=["both_sides", "causal"])


def sizes(shape, causal=False):
    names = ("q_len", "kv_len", "q_block_size", "kv_block_size")
    return dict(zip(names, shape, strict=True)) | {"causal": causal}


def count(length, block):
    return -(-length // block)


def allowed_by_token(shape, causal):
    """(rows, cols) bool: blocks with a pair of tokens (i, j), j <= i where causal."""
    q_len, kv_len, q_size, kv_size = shape
    allowed = torch.zeros(count(q_len, q_size), count(kv_len, kv_size), dtype=torch.bool)
    for i in range(q_len):
        for j in range(kv_len):
            if j <= i or not causal:
                allowed[i // q_size, j // kv_size] = True
    return allowed


def random_mask(shape, groups=3, share=0.4):
    """Random blocks; one row and one column are empty in every group."""
    q_len, kv_len, q_size, kv_size = shape
    mask = torch.rand(groups, count(q_len, q_size), count(kv_len, kv_size)) < share
    mask[:, mask.shape[1] // 2] = False
    mask[:, :, mask.shape[2] // 2] = False
    return mask


def made(shape, causal=False, groups=3, share=0.4):
    return BlockLayout.from_dense(random_mask(shape, groups, share), **sizes(shape, causal))


def raw(**changes):
    """A small valid layout with fields replaced, for what the constructor and ``validate`` refuse."""
    fields = {
        "crow_indices": torch.tensor([[0, 1, 3], [3, 4, 6]]),
        "col_indices": torch.tensor([0, 0, 1, 0, 0, 1], dtype=torch.int32),
        **sizes((16, 16, 8, 8), causal=True),
    }
    return BlockLayout(**(fields | changes))


# ---- making ----------------------------------------------------------------------------------------------------


@every_shape
@both_causalities
def test_a_mask_comes_back_without_what_lies_above_the_diagonal(shape, causal):
    mask = random_mask(shape)
    layout = BlockLayout.from_dense(mask, **sizes(shape, causal)).validate()
    assert layout.to_dense().equal(mask & allowed_by_token(shape, causal))
    assert layout.nnz_blocks == int((mask & allowed_by_token(shape, causal)).sum())
    assert (layout.num_groups, layout.num_q_blocks, layout.num_kv_blocks) == tuple(mask.shape)


def test_masks_of_all_heads_of_one_and_of_a_batch_are_flattened_to_groups():
    shape = SHAPES["square"]
    mask = random_mask(shape, groups=6)
    assert BlockLayout.from_dense(mask.view(2, 3, 8, 8), **sizes(shape)).to_dense().equal(mask)
    assert BlockLayout.from_dense(mask[0], **sizes(shape)).to_dense().equal(mask[:1])


@every_shape
@both_causalities
def test_lists_and_coordinates_make_the_layout_of_their_mask(shape, causal):
    mask = random_mask(shape)
    layout = BlockLayout.from_dense(mask, **sizes(shape, causal))
    rows = [[row.nonzero()[:, 0].tolist() for row in group] for group in mask]
    assert BlockLayout.from_rows(rows, **sizes(shape, causal)).digest() == layout.digest()
    alone = BlockLayout.from_rows(rows[1], **sizes(shape, causal))
    assert alone.to_dense().equal(layout.to_dense()[1:2])
    blocks = mask.nonzero()
    shuffled = torch.cat([blocks, blocks])[torch.randperm(2 * len(blocks))]  # twice, in any order
    again = BlockLayout.from_blocks(*shuffled.unbind(1), num_groups=3, **sizes(shape, causal))
    assert again.digest() == layout.digest()


def test_a_layout_without_blocks_is_a_layout():
    layout = BlockLayout.from_rows([[], []], **sizes((16, 16, 8, 8))).validate()
    assert layout.nnz_blocks == 0
    assert layout.density == 0.0
    assert not layout.to_dense().any()
    assert not layout.transpose().to_dense().any()


def test_kv_blocks_are_as_query_blocks_unless_said():
    layout = BlockLayout.from_rows([[0], [1]], q_len=16, kv_len=16, q_block_size=8)
    assert layout.kv_block_size == 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q_len": 0}, "q_len must be a positive integer, got 0"),
        ({"kv_len": 2.0}, "kv_len must be a positive integer, got 2.0"),
        ({"q_block_size": 24}, "q_block_size must be a positive power of two, got 24"),
        ({"kv_block_size": 0}, "kv_block_size must be a positive power of two, got 0"),
        ({"kv_block_size": True}, "kv_block_size must be a positive power of two, got True"),
    ],
)
def test_a_geometry_that_cannot_be_is_refused_wherever_a_layout_is_made(wrong, message):
    given = sizes((16, 16, 8, 8)) | wrong
    index = torch.tensor([0])
    for make in (
        lambda: raw(**wrong),
        lambda: BlockLayout.from_rows([[0], [1]], **given),
        lambda: BlockLayout.from_dense(torch.ones(2, 2, dtype=torch.bool), **given),
        lambda: BlockLayout.from_blocks(index, index, index, num_groups=1, **given),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"crow_indices": torch.tensor([0, 1, 3])},
            r"crow_indices must be int64 \(G, num_q_blocks \+ 1\), got .* \(3,\)",
        ),
        (
            {"crow_indices": torch.tensor([[0, 1, 3]], dtype=torch.int32)},
            "crow_indices must be int64 .* got torch.int32",
        ),
        ({"crow_indices": torch.tensor([[0, 6]])}, r"crow_indices must have 2 \+ 1 columns, got 2"),
        ({"col_indices": torch.tensor([0, 1])}, r"col_indices must be int32 \(nnz,\), got torch.int64 \(2,\)"),
        ({"col_indices": torch.zeros(2, 3, dtype=torch.int32)}, r"col_indices must be int32 .* \(2, 3\)"),
        ({"q_block_ids": torch.tensor([0, 1], dtype=torch.int32)}, "q_block_ids must be int64"),
        ({"kv_block_ids": torch.tensor([[0, 1]])}, "kv_block_ids must be int64"),
        ({"q_block_ids": torch.tensor([0])}, r"crow_indices must have 1 \+ 1 columns, got 3"),
        ({"kv_block_ids": torch.zeros(2, dtype=torch.int64, device="meta")}, "must share a device, got .*meta"),
    ],
)
def test_the_constructor_refuses_shapes_and_types(changes, message):
    with pytest.raises(ValueError, match=message):
        raw(**changes)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((2, 0, 0), r"group indices must lie in 0..1, got 2..2"),
        ((0, 2, 0), r"row indices must lie in 0..1, got 2..2"),
        ((0, 0, -1), r"column indices must lie in 0..1, got -1..-1"),
    ],
)
def test_coordinates_out_of_range_are_refused(index, message):
    group, row, col = (torch.tensor([i]) for i in index)
    with pytest.raises(ValueError, match=message):
        BlockLayout.from_blocks(group, row, col, num_groups=2, **sizes((16, 16, 8, 8)))


def test_lists_and_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"rows must list 2 query blocks .* got 3"):
        BlockLayout.from_rows([[0], [1], [1]], **sizes((16, 16, 8, 8)))
    with pytest.raises(ValueError, match=r"mask must be bool \(..., 2, 2\), got torch.bool \(2, 3\)"):
        BlockLayout.from_dense(torch.ones(2, 3, dtype=torch.bool), **sizes((16, 16, 8, 8)))
    with pytest.raises(ValueError, match=r"mask must be bool \(..., 2, 2\), got torch.float32"):
        BlockLayout.from_dense(torch.ones(2, 2), **sizes((16, 16, 8, 8)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crow_indices": torch.tensor([[1, 1, 3], [3, 4, 6]])}, "must ascend from 0 to nnz = 6"),
        ({"crow_indices": torch.tensor([[0, 1, 3], [3, 4, 5]])}, "must ascend from 0 to nnz = 6"),
        ({"crow_indices": torch.tensor([[0, 3, 1], [1, 4, 6]])}, "must ascend from 0 to nnz = 6"),
        ({"crow_indices": torch.tensor([[0, 1, 3], [2, 4, 6]])}, "must ascend from 0 to nnz = 6"),
        ({"crow_indices": torch.tensor([[0, 1, 3], [4, 4, 6]])}, "without gaps between groups"),
        ({"col_indices": torch.tensor([0, 0, 2, 0, 0, 1], dtype=torch.int32)}, "must lie in 0..1, got 0..2"),
        ({"col_indices": torch.tensor([-1, 0, 1, 0, 0, 1], dtype=torch.int32)}, "must lie in 0..1, got -1..1"),
        ({"col_indices": torch.tensor([0, 1, 0, 0, 0, 1], dtype=torch.int32)}, "must ascend strictly within a row"),
        ({"col_indices": torch.tensor([0, 1, 1, 0, 0, 1], dtype=torch.int32)}, "must ascend strictly within a row"),
        ({"col_indices": torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.int32)}, "hold no block above the diagonal"),
        ({"q_block_ids": torch.tensor([1, 0])}, "q_block_ids must ascend strictly within 0..1"),
        ({"q_block_ids": torch.tensor([0, 2])}, "q_block_ids must ascend strictly within 0..1"),
        ({"kv_block_ids": torch.tensor([-1, 0])}, "kv_block_ids must ascend strictly within 0..1"),
        ({"kv_block_ids": torch.tensor([0, 0])}, "kv_block_ids must ascend strictly within 0..1"),
    ],
)
def test_validate_catches_each_fault(changes, message):
    raw().validate()
    with pytest.raises(ValueError, match=message):
        raw(**changes).validate()


def test_a_layout_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        raw().causal = False


# ---- facts -----------------------------------------------------------------------------------------------------


@every_shape
@both_causalities
def test_allowed_blocks_density_and_diagonal_are_those_of_the_tokens(shape, causal):
    layout, allowed = made(shape, causal), allowed_by_token(shape, causal)
    assert layout.allowed_blocks.equal(allowed.sum(1))
    assert layout.density == pytest.approx(layout.nnz_blocks / (3 * int(allowed.sum())))
    assert layout.row_counts.equal(layout.to_dense().sum(2))
    q_len, kv_len, q_size, kv_size = shape
    crossing = [
        causal and min((col + 1) * kv_size, kv_len) - 1 > row * q_size
        for _, row, col in layout.to_dense().nonzero().tolist()
    ]
    assert layout.crosses_diagonal().tolist() == crossing
    assert torch.stack(layout.coordinates(), 1).equal(layout.to_dense().nonzero())
    assert (layout.q_tokens, layout.kv_tokens) == (q_len, kv_len)


# ---- operations ------------------------------------------------------------------------------------------------


@every_shape
@both_causalities
def test_or_and_and_are_those_of_the_masks_and_groups_broadcast(shape, causal):
    a, b, shared = made(shape, causal), made(shape, causal), made(shape, causal, groups=1)
    for left, right in ((a, b), (a, shared), (shared, a), (shared, shared)):
        assert (left | right).validate().to_dense().equal(left.to_dense() | right.to_dense())
        assert (left & right).validate().to_dense().equal(left.to_dense() & right.to_dense())


def test_selections_of_the_same_blocks_combine():
    shape = SHAPES["ragged"]
    a, b, ids = made(shape), made(shape), torch.tensor([1, 3, 7])
    combined = a.select(ids, None) | b.select(ids, None)
    assert combined.digest() == (a | b).select(ids, None).digest()
    with pytest.raises(ValueError, match="must hold the same blocks, q_block_starts differ"):
        a.select(ids, None) | b.select(ids - 1, None)


@pytest.mark.parametrize(
    ("shape", "causal", "message"),
    [
        ((64, 61, 8, 8), False, "must agree on kv_len, got 64 and 61"),
        ((64, 64, 16, 8), False, "must agree on q_block_size, got 8 and 16"),
        ((64, 64, 8, 8), True, "must agree on causal, got False and True"),
    ],
)
def test_layouts_of_other_geometry_do_not_combine(shape, causal, message):
    with pytest.raises(ValueError, match=message):
        made(SHAPES["square"]) | made(shape, causal)


def test_layouts_of_other_groups_or_types_do_not_combine():
    with pytest.raises(ValueError, match="groups must be equal or 1, got 3 and 2"):
        made(SHAPES["square"]) & made(SHAPES["square"], groups=2)
    with pytest.raises(TypeError, match="combines with a BlockLayout, got Tensor"):
        made(SHAPES["square"]) | torch.ones(8, 8)


@every_shape
@both_causalities
def test_the_transpose_swaps_rows_and_columns_and_bias_follows(shape, causal):
    layout = made(shape, causal)
    flipped, index = layout.transpose(return_index=True)
    assert flipped.validate().to_dense().equal(layout.to_dense().transpose(1, 2))
    assert (flipped.q_len, flipped.kv_len) == (shape[1], shape[0])
    bias = torch.arange(layout.nnz_blocks)
    scattered, expected = (torch.full(x.to_dense().shape, -1) for x in (flipped, layout))
    scattered[flipped.coordinates()] = bias[index]
    expected[layout.coordinates()] = bias
    assert scattered.equal(expected.transpose(1, 2))
    assert layout.transpose().digest() == flipped.digest()
    back, again = flipped.transpose(return_index=True)
    assert back.to_dense().equal(layout.to_dense())
    assert index[again].equal(bias)


@every_shape
@both_causalities
def test_a_selection_keeps_global_positions_and_bias_follows(shape, causal):
    layout = made(shape, causal)
    rows, cols = torch.arange(0, layout.num_q_blocks, 2), torch.arange(layout.num_kv_blocks)[-3:]
    part, index = layout.select(rows, cols, return_index=True)
    part.validate()
    assert part.to_dense().equal(layout.to_dense()[:, rows][:, :, cols])
    assert (part.q_len, part.kv_len, part.causal) == (layout.q_len, layout.kv_len, causal)
    assert part.q_block_starts.equal(layout.q_block_starts[rows])
    assert part.allowed_blocks.equal(allowed_by_token(shape, causal)[rows][:, cols].sum(1))
    assert part.crosses_diagonal().equal(layout.crosses_diagonal()[index])
    whole = torch.stack(layout.coordinates(), 1)[index]
    group, row, col = part.coordinates()
    assert whole.equal(torch.stack([group, rows[row], cols[col]], 1))
    q_len, kv_len, q_size, kv_size = shape
    assert part.q_tokens == sum(min(q_size, q_len - r * q_size) for r in rows.tolist())
    assert part.kv_tokens == sum(min(kv_size, kv_len - c * kv_size) for c in cols.tolist())


def test_a_selection_of_a_selection_speaks_in_global_ids():
    layout = made(SHAPES["ragged"], causal=True)
    outer = layout.select(torch.tensor([1, 3, 4, 7]), torch.tensor([0, 2, 7]))
    inner, index = outer.select(torch.tensor([3, 7]), torch.tensor([2, 7]), return_index=True)
    assert inner.digest() == layout.select(torch.tensor([3, 7]), torch.tensor([2, 7])).digest()
    assert outer.col_indices[index].tolist() == (inner.col_indices + 1).tolist()
    assert layout.select(None, None).digest() == layout.digest()
    flipped = outer.transpose()
    assert flipped.q_block_ids.tolist() == [0, 2, 7]
    assert flipped.kv_block_ids.tolist() == [1, 3, 4, 7]


def test_parts_of_a_partition_hold_every_block_once():
    layout = made(SHAPES["ragged"])
    places = [
        layout.select(rows, cols, return_index=True)[1]
        for rows in (torch.tensor([0, 3, 6]), torch.tensor([1, 2, 4, 5, 7]))
        for cols in (torch.arange(5), torch.arange(5, 8))
    ]
    assert torch.cat(places).sort().values.equal(torch.arange(layout.nnz_blocks))


@pytest.mark.parametrize("wanted", [[0, 9], [-1, 2], [2, 1], [1, 1]])
def test_blocks_that_are_not_at_hand_are_refused(wanted):
    layout = made(SHAPES["square"])
    with pytest.raises(ValueError, match="q_blocks must be strictly increasing ids of blocks at hand"):
        layout.select(torch.tensor(wanted), None)
    with pytest.raises(ValueError, match="kv_blocks must be strictly increasing ids of blocks at hand"):
        layout.select(None, torch.tensor(wanted))


def test_a_selection_may_be_empty_and_then_holds_nothing_more():
    nothing = torch.tensor([], dtype=torch.int64)
    empty = made(SHAPES["square"], causal=True).select(nothing, None).validate()
    assert (empty.num_q_blocks, empty.q_tokens, empty.nnz_blocks, empty.density) == (0, 0, 0, 0.0)
    assert empty.select(nothing, nothing).validate().kv_tokens == 0
    assert str(empty).startswith("BlockLayout: 64 x 64 tokens, 0 x 8 blocks")
    with pytest.raises(ValueError, match="q_blocks must be strictly increasing ids of blocks at hand"):
        empty.select(torch.tensor([0]), None)


@every_shape
def test_repeated_heads_lie_side_by_side(shape):
    layout = made(shape, causal=True)
    assert layout.repeat_heads(4).validate().to_dense().equal(layout.to_dense().repeat_interleave(4, 0))
    with pytest.raises(ValueError, match="repeats must be positive, got 0"):
        layout.repeat_heads(0)


def test_to_gives_the_same_layout_and_itself_where_it_is_there(device):
    layout = made(SHAPES["ragged"], causal=True).select(torch.tensor([1, 5]), None)
    moved = layout.to(device)
    assert moved.device.type == device
    assert moved.q_block_ids.device.type == device
    assert moved.digest() == layout.digest()
    assert moved.to(device) is moved


@both_causalities
def test_every_operation_stays_on_the_layouts_device(causal):
    a, b = made(SHAPES["ragged"], causal), made(SHAPES["ragged"], causal, groups=1)
    ids = torch.tensor([1, 4])

    def everything():
        results = [a | b, a & b, a.transpose(), a.select(ids, ids), a.select(ids, None), b.repeat_heads(2), a.to("cpu")]
        return [layout.validate().digest() for layout in results] + [
            a.describe(),
            str(a),
            a.crosses_diagonal().tolist(),
        ]

    expected = everything()
    with torch.device("meta"):  # a tensor made on the default device would be without contents
        assert everything() == expected


# ---- looking ---------------------------------------------------------------------------------------------------


def test_the_digest_is_stable_and_tells_layouts_apart():
    rows = [[0], [0, 1], [1, 2]]
    layout = BlockLayout.from_rows(rows, **sizes((20, 24, 8, 8), causal=True))
    assert layout.digest() == "135932b30499fc627eae81f9be248306", "stored records refer to it"
    assert len(layout.digest()) == 32
    others = [
        BlockLayout.from_rows([[0], [0, 1], [0, 2]], **sizes((20, 24, 8, 8), causal=True)),
        BlockLayout.from_rows(rows, **sizes((20, 24, 8, 8), causal=False)),
        BlockLayout.from_rows(rows, **sizes((21, 24, 8, 8), causal=True)),
        BlockLayout.from_rows(rows, **sizes((20, 23, 8, 8), causal=True)),
        BlockLayout.from_rows([rows, rows], **sizes((20, 24, 8, 8), causal=True)),
        layout.select(torch.tensor([0, 1]), None),
        layout.select(None, torch.tensor([0, 1])),
    ]
    assert len({layout.digest(), *(other.digest() for other in others)}) == 8


def test_the_picture_counts_kept_and_allowed_blocks_in_each_cell():
    shape = (200, 168, 8, 8)  # 25 x 21 blocks in at most 6 cells a side
    layout, allowed = made(shape, causal=True), allowed_by_token(shape, True)
    kept, possible = layout.picture(group=2, max_cells=6)
    dense = layout.to_dense()[2]
    expected = torch.zeros(2, 6, 6, dtype=torch.int64)
    for row in range(25):
        for col in range(21):
            cell = (row * 6 // 25, col * 6 // 21)
            expected[0][cell] += int(dense[row, col])
            expected[1][cell] += int(allowed[row, col])
    assert kept.equal(expected[0])
    assert possible.equal(expected[1])


def test_the_description_shades_cells_by_what_they_keep():
    rows = [[0], [0, 1], [], [0, 1, 2, 3]]
    layout = BlockLayout.from_rows(rows, **sizes((32, 32, 8, 8), causal=True))
    assert layout.describe().splitlines() == [
        "BlockLayout: 32 x 32 tokens, 4 x 4 blocks of 8 x 8, all heads share it, causal, 7 blocks kept, density 70.00%",
        "██······",
        "████····",
        "      ··",
        "████████",
    ]
    assert layout.describe(max_cells=2).splitlines()[1:] == ["██··", "▒▒▓▓"]
    with pytest.raises(ValueError, match=r"group must lie in 0..0, got 1"):
        layout.describe(group=1)
