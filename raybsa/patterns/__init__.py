"""Patterns: rules that give a BlockLayout at any length. One family a file; ``catalog`` names them.

>>> from raybsa import patterns
>>> rule = patterns.build("sink_window") | patterns.build({"name": "random", "params": {"seed": 7}})
>>> layout = rule.layout(8192, num_heads=8, causal=True, density=0.1)
"""

from raybsa.patterns.bigbird import BigBird
from raybsa.patterns.blocks import Blocks, save_blocks
from raybsa.patterns.butterfly import Butterfly
from raybsa.patterns.catalog import CATALOG, build
from raybsa.patterns.chunked import Chunked
from raybsa.patterns.dense import Dense
from raybsa.patterns.dilated import Dilated
from raybsa.patterns.document import Document
from raybsa.patterns.fixed import Fixed
from raybsa.patterns.global_blocks import GlobalBlocks
from raybsa.patterns.heads import PerHead, per_head
from raybsa.patterns.pattern import Pattern, Union
from raybsa.patterns.power_of_two import PowerOfTwo
from raybsa.patterns.random import Random
from raybsa.patterns.sink_window import SinkWindow
from raybsa.patterns.sliding_window import SlidingWindow
from raybsa.patterns.strided import Strided
from raybsa.patterns.vertical_slash import VerticalSlash

__all__ = [
    "CATALOG",
    "BigBird",
    "Blocks",
    "Butterfly",
    "Chunked",
    "Dense",
    "Dilated",
    "Document",
    "Fixed",
    "GlobalBlocks",
    "Pattern",
    "PerHead",
    "PowerOfTwo",
    "Random",
    "SinkWindow",
    "SlidingWindow",
    "Strided",
    "Union",
    "VerticalSlash",
    "build",
    "per_head",
    "save_blocks",
]
