"""Orthonormal columns, the same bits for any number of threads: LAPACK's QR is not, and ranks would drift apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256
# Relative to the trace: above the rounding of the Gram matrix, so that a matrix of less than full rank has a root.
SHIFT = 1e-14
LEAST = 1e-300


def orthonormal(x: Tensor) -> Tensor:
    """Columns (n, r) that span those of x (n, r), n >= r, by a Cholesky QR in float64 (Fukaya et al. 1809.11085).

    A column that depends on those before it, or is zero, comes out no longer than 1 instead of exactly 1. If any
    element of x is not finite, all of the result are NaN.
    """
    finite = x.isfinite().all()
    columns = x.double().nan_to_num(0.0, 0.0, 0.0)
    gram = gram_matrix(columns)
    eye = torch.eye(x.shape[1], dtype=gram.dtype, device=gram.device)
    root = torch.linalg.cholesky_ex(gram + eye * (gram.trace() * SHIFT + LEAST)).L
    inverse = torch.linalg.solve_triangular(root, eye, upper=False)
    return torch.where(finite, columns @ inverse.mT, torch.nan).to(x.dtype)


def gram_matrix(x: Tensor) -> Tensor:
    """x^T x (r, r) of x (n, r): products of 256 rows at a time, added up in a tree whose shape depends on n alone."""
    blocks = F.pad(x, (0, 0, 0, -x.shape[0] % ROWS)).view(-1, ROWS, x.shape[1])
    sums = blocks.mT @ blocks
    while len(sums) > 1:
        half = len(sums) // 2
        sums = torch.cat([sums[:half] + sums[half : 2 * half], sums[2 * half :]])
    return sums[0]
