"""A saved program holds its pattern: in another process it attends by that one, whatever other patterns live there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybsa import BlockLayout, block_sparse_attention, create_multihead_block_sparse
from raybsa.kernels.cpp_build import why_no_compiler
from raybsa.patterns import SinkWindow
from raybsa.patterns.written import WrittenRule, rule_in

LENGTHS = (96, 130)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's compiler itself
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),  # of torch.export, about constants
]


class ByPattern(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"pattern": "bigbird", "density": 0.5, "block_size": 16, "causal": True}
        self.attention = create_multihead_block_sparse(32, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class ByLayout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        rows = [[j for j in range(i + 1) if (i - j) % 2 == 0] for i in range(6)]
        self.layout = BlockLayout.from_rows(rows, q_len=96, kv_len=96, q_block_size=16, causal=True)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 16)).transpose(1, 2)
        return block_sparse_attention(q, q, q, self.layout).transpose(1, 2).flatten(2)  # type: ignore[union-attr]


LOAD = """
import sys, torch, raybsa.kernels.operator
from raybsa import create_multihead_block_sparse
others = [create_multihead_block_sparse(32, 2, pattern="sliding_window", density=0.1, block_size=16) for _ in range(3)]
for name in sys.argv[1:]:
    program = torch._inductor.aoti_load_package(name) if "aoti" in name else torch.export.load(name).module()
    for x, wanted in torch.load(name + ".expected"):
        torch.testing.assert_close(program(x), wanted)
"""


def exported(module: nn.Module, x: Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return torch.export.export(module, (x,), **options)


def test_another_process_attends_by_the_saved_pattern(tmp_path: Path) -> None:
    x, longer = (torch.randn(1, length, 32) for length in LENGTHS)
    module, by_layout = ByPattern().eval(), ByLayout()
    any_length = {"dynamic_shapes": {"x": {1: torch.export.Dim("length", min=16, max=512)}}}
    programs = {
        "one_length": (exported(module, x), module, (x,)),
        "strict": (exported(module, x, strict=True), module, (x,)),
        "any_length": (exported(module, x, **any_length), module, (x, longer)),
        "layout": (exported(by_layout, x), by_layout, (x,)),
    }
    for name, (program, eager, inputs) in programs.items():
        with torch.no_grad():
            expected = [(y, eager(y)) for y in inputs]
        for y, wanted in expected:
            torch.testing.assert_close(program.module()(y), wanted)
        torch.export.save(program, tmp_path / name)
        torch.save(expected, tmp_path / f"{name}.expected")
    subprocess.run([sys.executable, "-c", LOAD, *programs], cwd=tmp_path, check=True, capture_output=True, text=True)


@pytest.mark.skipif(why_no_compiler() is not None, reason="AOTInductor needs a C++ compiler")
def test_a_program_compiled_ahead_of_time_holds_its_pattern_too(tmp_path: Path) -> None:
    x, module = torch.randn(1, LENGTHS[0], 32), ByPattern().eval()
    name = "aoti_one_length.pt2"
    torch._inductor.aoti_compile_and_package(exported(module, x), package_path=str(tmp_path / name))
    with torch.no_grad():
        torch.save([(x, module(x))], tmp_path / f"{name}.expected")
    subprocess.run([sys.executable, "-c", LOAD, name], cwd=tmp_path, check=True, capture_output=True, text=True)


# ---- written rules --------------------------------------------------------------------------------------------------


def test_a_rule_is_found_by_its_tensor_and_made_from_its_bytes() -> None:
    rule = WrittenRule(SinkWindow(sink=20), 0.3, 16, True)
    assert rule_in(rule.tensor) is rule
    again = rule_in(rule.tensor.clone())
    assert again is not rule
    wanted = rule.layout(100, 100, 2, torch.device("cpu"))
    assert again.layout(100, 100, 2, torch.device("cpu")).digest() == wanted.digest()


def test_a_rule_of_another_meaning_or_of_nobody_s_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = WrittenRule(SinkWindow(sink=21), 0.3, 16, True)
    monkeypatch.setattr("raybsa.patterns.written.DENSITY_MEANING", 3)
    with pytest.raises(ValueError, match="saved by another version of raybsa"):
        rule_in(rule.tensor.clone())
    monkeypatch.undo()
    text = bytes(WrittenRule(SinkWindow(sink=20), 0.3, 16, True).tensor.numpy()).replace(
        b'"sink_window"', b'"nowhere:Nothing"'
    )
    with pytest.raises(ValueError, match="nowhere:Nothing"):
        rule_in(torch.frombuffer(bytearray(text), dtype=torch.uint8))


def test_a_program_holds_the_weights_and_the_extra_keys() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options: dict[str, Any] = {"pattern": "bigbird", "density": 0.4, "block_size": 8, "causal": True}
            self.attention = create_multihead_block_sparse(
                32, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True, **options
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)

    module, x = Whole().eval(), torch.randn(2, 2, 33, 32)
    program = exported(module, x[0], strict=False).module()
    with torch.no_grad():
        torch.testing.assert_close(program(x[1]), module(x[1]))


def test_a_backend_that_no_program_can_hold_is_refused() -> None:
    layout = BlockLayout.from_rows([[0]], q_len=4, kv_len=4, q_block_size=4)

    class ByReference(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return block_sparse_attention(q, q, q, layout, backend="reference")  # type: ignore[return-value]

    with pytest.raises(NotImplementedError, match=r"an exported program holds attention by 'auto'.* got backend 'ref"):
        exported(ByReference(), torch.randn(1, 1, 4, 8), strict=False)
