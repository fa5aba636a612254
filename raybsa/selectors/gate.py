"""Gate: from pooled q and k to vectors whose products are the scores of blocks.

After SeerAttention (Gao et al., 2410.13276): a linear map a KV head from pooled statistics to a few numbers. Position
comes in as products too: Fourier features of the block's number, whose learned amplitudes make any function of the
distance that a few waves can make. So a score is one dot product, and a tile of scores one matrix product.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

_WAVES = 12
_RECENCY = 0.5  # of each wave at first: as lengths go by factors of two, a score falls by as much with every doubling
_SHORTEST, _LONGEST = 3.0, 8192.0  # wave lengths in blocks


class Gate(nn.Module):
    """Scores ``u @ w.T`` of query blocks against KV blocks, one map a KV head.

    It starts as a random projection of means and first tokens, near the mean-pooled scores; maxima are learned.

    Args:
        kv_heads: Hkv.
        queries_per_kv: query heads that share a KV head.
        head_dim: D.
        gate_dim: numbers a block, at most D.
    """

    def __init__(self, kv_heads: int, queries_per_kv: int, head_dim: int, gate_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(kv_heads, queries_per_kv, 3, head_dim, gate_dim))
        self.key = nn.Parameter(torch.empty(kv_heads, 4, head_dim, gate_dim))
        self.waves = nn.Parameter(torch.empty(kv_heads, 2, _WAVES))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Equal orthogonal maps of a mean query and a mean key; so that their product is about ``q @ k / sqrt(D)``."""
        head_dim, gate_dim = self.key.shape[2:]
        drawn = [torch.empty(head_dim, gate_dim) for _ in self.key]
        maps = torch.stack([nn.init.orthogonal_(x, generator=generator) for x in drawn]) * math.sqrt(
            head_dim / gate_dim
        )
        self.key.zero_()[:, 0] = maps
        self.query.zero_()[:, :, ::2] = maps[:, None, None] * (0.5 / math.sqrt(head_dim) / self.query.shape[1])
        nn.init.normal_(self.waves, std=0.02, generator=generator)
        self.waves[:, 0] += _RECENCY

    @property
    def dtype(self) -> torch.dtype:
        """What scores are computed in: float64 for float64 parameters, else float32."""
        return torch.float64 if self.key.dtype == torch.float64 else torch.float32

    def queries(self, features: Tensor, place: Tensor) -> Tensor:
        """u (B, Hkv, n, gate_dim + 2 waves) of ``query_features`` and ``position_waves`` (n, 2, waves)."""
        weight = self.query.to(self.dtype).flatten(1, 3)
        place = place.to(self.dtype).flatten(1).expand(*features.shape[:2], -1, -1)
        return torch.cat([features.to(self.dtype) @ weight, place], -1)

    def keys(self, features: Tensor, place: Tensor) -> Tensor:
        """w (B, Hkv, n, gate_dim + 2 waves) of ``key_features`` and ``position_waves`` (n, 2, waves).

        With ``cos(i - j) = cos i cos j + sin i sin j`` the products of u and w hold
        ``sum_m a_m cos(f_m (i - j)) + c_m sin(f_m (i - j))``.
        """
        weight = self.key.to(self.dtype).flatten(1, 2)
        place = place.to(self.dtype)
        cos, sin = place.unbind(1)
        a, c = self.waves.to(self.dtype)[:, :, None, None].unbind(1)
        place = (place * a + torch.stack([-sin, cos], 1) * c).flatten(2).expand(len(features), -1, -1, -1)
        return torch.cat([features.to(self.dtype) @ weight, place], -1)


def cooled(scores: Tensor, temperature: float) -> Tensor:
    """Scores over the temperature of the softmax or sigmoid that they go to."""
    return scores if temperature == 1.0 else scores / temperature


@lru_cache(maxsize=16)
def position_waves(count: int, device: torch.device | str) -> Tensor:
    """(count, 2, waves) float32 cosines and sines of the numbers of blocks; made in float64, as numbers are large."""
    with torch.inference_mode(False):  # a later training step must be able to use it
        ratio = (_LONGEST / _SHORTEST) ** (1.0 / (_WAVES - 1))
        lengths = _SHORTEST * ratio ** torch.arange(_WAVES, dtype=torch.float64)
        angle = torch.arange(count, dtype=torch.float64)[:, None] * (2.0 * math.pi / lengths)
        return torch.stack([angle.cos(), angle.sin()], 1).float().to(device)
