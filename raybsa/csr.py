"""Csr: which columns each row holds, in O(nnz). The words are those of ``torch.sparse``; a row holds no values.

What stands here knows neither tokens nor causality: it is the arithmetic of layouts on offsets and columns alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raybsa.aside import made_aside


@dataclass(frozen=True, eq=False)
class Csr:
    """Rows of ascending columns, in one or more groups of as many rows.

    Args:
        crow_indices: (G, num_rows + 1) int64 absolute offsets: row ``i`` of group ``g`` holds
            ``col_indices[crow_indices[g, i]:crow_indices[g, i + 1]]``.
        col_indices: (nnz,) int32.
        num_columns: how many there are.
    """

    crow_indices: Tensor
    col_indices: Tensor
    num_columns: int

    @classmethod
    def of_coordinates(cls, coordinates: Sequence[Tensor], num_groups: int, num_rows: int, num_columns: int) -> Csr:
        """From the group, row and column (n,) of every entry, in any order; repeats count once.

        Raises:
            ValueError: one is out of range.
        """
        sizes = (num_groups, num_rows, num_columns)
        for name, index, size in zip(("group", "row", "column"), coordinates, sizes, strict=True):
            if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < size):
                raise ValueError(
                    f"{name} indices must lie in 0..{size - 1}, got {int(index.min())}..{int(index.max())}"
                )
        group, row, col = (index.long() for index in coordinates)
        return cls.of_keys(torch.unique((group * num_rows + row) * num_columns + col), *sizes)

    @classmethod
    def of_keys(cls, keys: Tensor, num_groups: int, num_rows: int, num_columns: int) -> Csr:
        """From the ascending ``keys`` (nnz,) int64: ``(group * num_rows + row) * num_columns + column`` of an entry."""
        columns = max(num_columns, 1)
        return cls(_offsets(keys // columns, num_groups, num_rows), (keys % columns).to(torch.int32), num_columns)

    @property
    def num_groups(self) -> int:
        return self.crow_indices.shape[0]

    @property
    def num_rows(self) -> int:
        return self.crow_indices.shape[1] - 1

    @property
    def nnz(self) -> int:
        return self.col_indices.shape[0]

    @made_aside
    def counts(self) -> Tensor:
        """(G, num_rows) int64: columns of each row."""
        return self.crow_indices[:, 1:] - self.crow_indices[:, :-1]

    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """(nnz,) int64 each: group, row and column of every entry, in storage order."""
        flat = torch.arange(self.counts.numel(), device=self.col_indices.device)
        row = torch.repeat_interleave(flat, self.counts.reshape(-1), output_size=self.nnz)
        rows = max(self.num_rows, 1)
        return row // rows, row % rows, self.col_indices.long()

    def keys(self) -> Tensor:
        """(nnz,) int64, as ``of_keys`` takes them."""
        group, row, col = self.coordinates()
        return (group * self.num_rows + row) * self.num_columns + col

    def validate(self) -> None:
        """Raises ValueError unless offsets ascend from 0 to nnz and columns, in range, strictly ascend in every row."""
        crow, col = self.crow_indices, self.col_indices
        flat = torch.cat([crow[:, :-1].reshape(-1), crow[-1:, -1]])
        joined = torch.equal(crow[:-1, -1], crow[1:, 0])
        if int(flat[0]) != 0 or int(flat[-1]) != self.nnz or bool((flat.diff() < 0).any()) or not joined:
            raise ValueError(f"crow_indices must ascend from 0 to nnz = {self.nnz} without gaps between groups")
        if self.nnz and not (int(col.min()) >= 0 and int(col.max()) < self.num_columns):
            raise ValueError(
                f"col_indices must lie in 0..{self.num_columns - 1}, got {int(col.min())}..{int(col.max())}"
            )
        if bool((self.keys().diff() <= 0).any()):
            raise ValueError("col_indices must ascend strictly within a row")

    # ---- operations --------------------------------------------------------------------------------------------

    def where(self, kept: Tensor) -> Csr:
        """The entries that are ``kept`` (nnz,) bool."""
        return self._with_keys(self.keys()[kept], self.num_groups)

    def union(self, other: Csr) -> Csr:
        """The entries of either; groups broadcast, rows and columns are the same."""
        a, b = self._of_equal_groups(other)
        return self._with_keys(torch.unique(torch.cat([a.keys(), b.keys()])), a.num_groups)

    def intersection(self, other: Csr) -> Csr:
        """The entries of both."""
        a, b = self._of_equal_groups(other)
        keys, counts = torch.unique(torch.cat([a.keys(), b.keys()]), return_counts=True)
        return self._with_keys(keys[counts == 2], a.num_groups)

    def repeat(self, copies: int) -> Csr:
        """Every group ``copies`` times in a row."""
        group, row, col = self.coordinates()
        size = self.num_rows * self.num_columns
        first = (group * copies * self.num_rows + row) * self.num_columns + col
        spread = first[:, None] + torch.arange(copies, device=col.device) * size
        return self._with_keys(spread.reshape(-1).sort().values, self.num_groups * copies)

    def group(self, number: int) -> Csr:
        """One group alone."""
        crow = self.crow_indices[number : number + 1]
        begin, end = int(crow[0, 0]), int(crow[0, -1])
        return Csr(crow - begin, self.col_indices[begin:end], self.num_columns)

    def transpose(self) -> tuple[Csr, Tensor]:
        """Columns as rows, and (nnz,) int64 each entry's place before."""
        group, row, col = self.coordinates()
        order = torch.argsort(group * self.num_columns + col, stable=True)
        crow = _offsets((group * self.num_columns + col)[order], self.num_groups, self.num_columns)
        return Csr(crow, row[order].to(torch.int32), self.num_rows), order

    def select(self, rows: Tensor | None, columns: Tensor | None) -> tuple[Csr, Tensor]:
        """The rows and columns (places, ascending; None: all) alone, and (nnz,) int64 each entry's place before."""
        device = self.col_indices.device
        counts = self.counts if rows is None else self.counts[:, rows]
        starts = self.crow_indices[:, :-1] if rows is None else self.crow_indices[:, :-1][:, rows]
        row = torch.repeat_interleave(torch.arange(counts.numel(), device=device), counts.reshape(-1))
        before = counts.reshape(-1).cumsum(0) - counts.reshape(-1)
        index = (starts.reshape(-1) - before)[row] + torch.arange(len(row), device=device)
        col, num_columns = self.col_indices[index], self.num_columns
        if columns is not None:
            num_columns = len(columns)
            place = torch.full((self.num_columns,), -1, dtype=torch.int32, device=device)
            place[columns] = torch.arange(num_columns, dtype=torch.int32, device=device)
            col = place[col]
            kept = (col >= 0).nonzero()[:, 0]
            row, col, index = row[kept], col[kept], index[kept]
        return Csr(_offsets(row, self.num_groups, counts.shape[1]), col, num_columns), index

    def select_groups(self, groups: Tensor) -> tuple[Csr, Tensor]:
        """The groups of these numbers (n,), in this order, and (nnz,) int64 each entry's place before."""
        counts, starts = self.counts[groups].reshape(-1), self.crow_indices[groups, :-1].reshape(-1)
        row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        before = counts.cumsum(0) - counts
        index = (starts - before)[row] + torch.arange(len(row), device=row.device)
        return Csr(_offsets(row, len(groups), self.num_rows), self.col_indices[index], self.num_columns), index

    def _with_keys(self, keys: Tensor, num_groups: int) -> Csr:
        return Csr.of_keys(keys, num_groups, self.num_rows, self.num_columns)

    def _of_equal_groups(self, other: Csr) -> tuple[Csr, Csr]:
        groups = max(self.num_groups, other.num_groups)
        if {self.num_groups, other.num_groups} - {1, groups}:
            raise ValueError(f"groups must be equal or 1, got {self.num_groups} and {other.num_groups}")
        a, b = (x if x.num_groups == groups else x.repeat(groups) for x in (self, other))
        return a, b


def _offsets(flat_rows: Tensor, num_groups: int, num_rows: int) -> Tensor:
    """CSR offsets (num_groups, num_rows + 1) from the ascending flat row (group * num_rows + row) of every entry."""
    counts = torch.bincount(flat_rows, minlength=num_groups * num_rows)
    total = torch.zeros(num_groups * num_rows + 1, dtype=torch.int64, device=flat_rows.device)
    torch.cumsum(counts, 0, out=total[1:])
    starts = torch.arange(num_groups, device=flat_rows.device)[:, None] * num_rows
    return total[starts + torch.arange(num_rows + 1, device=flat_rows.device)]
