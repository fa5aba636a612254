"""FlexAttention's tiles on CUDA where blocks are smaller than torch's own choice of tile.

torch takes one configuration a GPU (128 rows forward, 64 x 128 and 128 x 64 backward on Hopper) and refuses blocks that
it does not divide. Forward tiles can be given; for the backward there is no option that is looked at in time (torch
2.11 to 2.13), so its list of configurations is replaced while such a backward is compiled.
"""

from __future__ import annotations

from functools import cache

from raybsa.layout import BlockLayout

SMALL, LARGE = 64, 128
_wants_small = False


def forward_options(layout: BlockLayout) -> dict[str, int]:
    """Kernel options with tiles that divide the blocks; none where torch's own do."""
    if _is_large(layout):
        return {}
    tiles = {"fwd_BLOCK_M": min(SMALL, layout.q_block_size), "fwd_BLOCK_N": min(SMALL, layout.kv_block_size)}
    return tiles | {"fwd_num_warps": 4}


def prepare(layout: BlockLayout) -> None:
    """Before a call: says which backward tiles its blocks need, for the compilation at its first backward.

    The word holds until the next call. A backward that is compiled after a call with other blocks raises torch's error
    about missing configurations; nothing is ever computed otherwise.
    """
    global _wants_small
    _wants_small = not _is_large(layout)
    if _wants_small:
        _replace_backward_tiles()


def _is_large(layout: BlockLayout) -> bool:
    return layout.q_block_size % LARGE == 0 and layout.kv_block_size % LARGE == 0


@cache
def _replace_backward_tiles() -> None:
    from torch._inductor.choices import InductorChoices
    from torch._inductor.template_heuristics.triton import FlexBwDConfig

    own = InductorChoices.get_flex_attention_bwd_configs

    def configurations(self, *arguments, **options):
        if _wants_small:
            return [FlexBwDConfig(SMALL, SMALL, SMALL, SMALL, 3, 4)]
        return own(self, *arguments, **options)

    InductorChoices.get_flex_attention_bwd_configs = configurations  # type: ignore[method-assign]
