"""Rows of the gpu suite whose times follow a rule: a launch, and a share of dense attention's time."""

from __future__ import annotations

import re
from dataclasses import replace

from raybsa.experiments.peer_cells import Cell, cells
from raybsa.experiments.peer_rows import held_bytes
from raybsa.results.record import Record
from raybsa.tasks.peers import of_backend
from tests.dashboards.made import record

LAUNCH_MS = {"triton": 0.04, "flex": 0.1, "fa4": 0.12, "cudnn": 0.08}
SHARE = {"triton": 0.8, "flex": 0.62, "fa4": 0.95, "cudnn": 0.75}
MEMORY = {"triton": 0.03, "flex": 0.1, "fa4": 0.5, "cudnn": 0.3}


def peer_record(cell: Cell, backend: str, status: str = "ok", **values: object) -> Record:
    """A library's row: its own launch, and dense attention's time × density / its share of the ideal."""
    spec = cell.spec
    percent = re.search(r"-([\d.]+)%$", cell.name)
    density = spec.layer(0).density or (float(percent[1]) / 100 if percent else 0.1)
    dense = 14.3 * (spec.seq_len / 32768) ** 2 * spec.head_dim / 128
    forward = LAUNCH_MS[backend] + dense * density / SHARE[backend]
    measured = {
        "job": "benchmark",
        "density": density,
        "block_size": spec.layer(0).block_size,
        "backend": backend,
        "forward_ms_p50": forward,
        "forward_backward_ms_p50": 4 * forward,
        "dense_forward_ms_p50": dense,
        "dense_forward_backward_ms_p50": 4 * dense,
        "peak_bytes": int((1 + MEMORY[backend]) * held_bytes(spec)),
        "dense_peak_bytes": int(1.25 * held_bytes(spec)),
        "layout_bytes": 1 << 20,
        "error_forward": 2e-3,
        "error_gradient": 3e-3,
        "reference_error_forward": 2e-3,
        "reference_error_gradient": 2e-3,
        "library": f"{backend} 1.0",
        "capability": "sm_90",
        "device": "cuda",
        "device_name": "NVIDIA H100 80GB HBM3",
    }
    trial_id = f"peers-{of_backend(spec, backend).digest}"
    return replace(record(trial_id, of_backend(spec, backend), status=status), **(measured | values))


def a_gpu_suite() -> list[Record]:
    """Every cell; FA4 refuses blocks of 64 and cuDNN has no backward at head_dim 64."""
    rows = []
    for cell in cells():
        for backend in ("triton", *(("flex", "fa4", "cudnn") if cell.peers else ())):
            refused = backend == "fa4" and cell.spec.layer(0).block_size != 128
            alone = {"forward_backward_ms_p50": None} if backend == "cudnn" and cell.spec.head_dim == 64 else {}
            rows.append(peer_record(cell, backend, "refused" if refused else "ok", **alone))
    return rows
