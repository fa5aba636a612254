"""Exact attention over a sequence that is split across ranks: who owns what, who needs what, and the hops between."""
