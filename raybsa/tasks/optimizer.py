"""AdamW that starts at once: it is torch's own, and leaves ``torch._dynamo`` alone.

torch's optimizers import ``torch._dynamo``, with sympy, inductor and pandas, when they are first called, to tell a
compiler that may be at work to keep out of them. A fresh worker would spend more time on that than on importing torch's
other half, and trains without ``torch.compile``.
"""

from __future__ import annotations

import inspect

import torch


class AdamW(torch.optim.AdamW):
    """The same steps to the bit; its methods are torch's without their wrappers: not for ``torch.compile``."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
