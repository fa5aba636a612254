"""Imports run downward: the floors of docs/design.md, read from the source, and a proof that the check can fail."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Floor of each room, bottom first; docs/design.md draws the same house.
FLOORS = {
    "raybsa.aside": 0,
    "raybsa.axis": 0,
    "raybsa.cache": 0,
    "raybsa.csr": 0,
    "raybsa.holder": 0,
    "raybsa.layout": 0,
    "raybsa.picture": 0,
    "raybsa.printable": 0,
    "raybsa.scratch": 0,
    "raybsa.spec": 0,
    "raybsa.content": 0,
    "raybsa.counter": 0,
    "raybsa.locks": 0,
    "raybsa.own": 0,
    "raybsa.comm": 1,
    "raybsa.events": 1,
    "raybsa.signals": 1,
    "raybsa.timing": 1,
    "raybsa.results": 1,
    "raybsa.patterns": 2,
    "raybsa.kernels": 2,
    "raybsa.gradients": 2,
    "raybsa.ring": 3,
    "raybsa.selectors": 3,
    "raybsa.variants": 4,
    "raybsa.tasks": 5,
    "raybsa.cluster": 6,
    "raybsa.experiments": 7,
    "dashboards": 8,
    "dashboards.app": 8,
    "jobs": 9,
}
MAY_IMPORT = {
    "ray": {"raybsa.cluster", "raybsa.experiments", "jobs"},
    "plotly": {"dashboards", "dashboards.app"},
    "dash": {"dashboards.app"},
    "flask": {"dashboards.app"},
    "optuna": {"raybsa.experiments"},
    "transformers": {"raybsa.variants"},
    "pyarrow": {"raybsa.results", "raybsa.patterns", "raybsa.cluster", "dashboards", "dashboards.app"},
}


def room_of(module: str) -> str | None:
    return max((room for room in FLOORS if f"{module}.".startswith(f"{room}.")), key=len, default=None)


def imports_of(source: str, module: str, known: Iterable[str]) -> set[str]:
    """Absolute names of all modules that a source imports, also inside functions; ``from package import module`` names
    the module where it is ``known``, else the package."""
    found: set[str] = set()
    package = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            full = {f"{name}.{alias.name}" for alias in node.names}
            found |= full & set(known) | ({name} if full - set(known) else set())
    return found


def modules() -> dict[str, str]:
    files = [path for top in ("raybsa", "dashboards", "jobs") for path in (ROOT / top).rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    return {name: path.read_text() for name, path in zip(names, files, strict=True)}


def upward(sources: dict[str, str], known: Iterable[str]) -> list[str]:
    """Every import that climbs, enters the package's front door from below, or takes a library its floor may not."""
    wrong = []
    for module, source in sources.items():
        room = room_of(module)
        for name in sorted(imports_of(source, module, known)):
            target, library = room_of(name), name.split(".")[0]
            if room and target and FLOORS[target] > FLOORS[room]:
                wrong.append(f"{module} -> {name}")
            if room and library in MAY_IMPORT and room not in MAY_IMPORT[library]:
                wrong.append(f"{module} -> {name} ({library} belongs to {sorted(MAY_IMPORT[library])})")
            if room and room.startswith("raybsa.") and name == "raybsa":
                wrong.append(f"{module} -> raybsa (its own front door)")
    return wrong


def circles(sources: dict[str, str]) -> list[str]:
    graph = {
        module: {name for name in imports_of(source, module, sources) if name in sources and name != module}
        for module, source in sources.items()
        if module != "raybsa"
    }
    found: list[str] = []
    state: dict[str, int] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        state[module] = 1
        for name in sorted(graph.get(module, ())):
            if state.get(name) == 1:
                found.append(" -> ".join((*trail[trail.index(name) :], name)) if name in trail else name)
            elif name not in state:
                visit(name, (*trail, name))
        state[module] = 2

    for module in sorted(graph):
        if module not in state:
            visit(module, (module,))
    return found


def test_every_module_has_a_floor() -> None:
    homeless = [m for m in modules() if m not in ("raybsa", "dashboards", "jobs") and room_of(m) is None]
    assert not homeless, f"no floor in FLOORS for {homeless}"


def test_imports_only_point_down_or_sideways() -> None:
    assert not upward(modules(), modules())


def test_no_module_takes_part_in_an_import_circle() -> None:
    assert not circles(modules())


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("raybsa.layout", "from raybsa.kernels.api import block_sparse_attention"),
        ("raybsa.kernels.api", "def f():\n    import ray"),
        ("raybsa.patterns.bigbird", "from raybsa import BlockLayout"),
        ("raybsa.variants.base", "from ..tasks.byte_lm import ByteLM"),
        ("raybsa.tasks.recall", "import plotly.graph_objects as go"),
    ],
)
def test_the_check_sees_an_import_that_climbs(module: str, line: str) -> None:
    assert upward({module: line}, modules())


def test_the_check_sees_a_circle() -> None:
    assert circles({"raybsa.layout": "import raybsa.spec", "raybsa.spec": "from raybsa import layout"})


LOADS = """
import sys, raybsa
heavy = ("ray", "pyarrow", "plotly", "optuna", "torch._dynamo", "transformers", "triton")
loaded = lambda: print([name for name in heavy if name in sys.modules])
raybsa.BlockLayout, raybsa.block_sparse_attention, raybsa.create_block_sparse_attention
loaded()
from raybsa.cluster.worker import Worker
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
window = AttentionSpec("base", PatternSpec("sliding_window"), density=0.5, block_size=16)
spec = TrialSpec("recall", (window,), seq_len=64, train_len=32, train_steps=2, num_layers=1, num_heads=2, head_dim=8)
assert Worker(repeats=1, budget_s=0.0).run(spec).trained_steps == 2
loaded()
"""


def test_importing_raybsa_loads_none_of_the_heavy_libraries_nor_does_a_worker_that_times_and_trains() -> None:
    """A fresh worker would spend a second and more on ``torch._dynamo``."""
    shown = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, cwd=ROOT, check=True)
    assert shown.stdout.splitlines() == ["[]", "[]"], shown.stdout
