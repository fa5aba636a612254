"""Variants: attention as nn.Modules. Each asks its ``LayoutSource`` which blocks to keep and calls a kernel."""
