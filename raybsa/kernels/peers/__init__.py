"""Other libraries' kernels behind the contract of a backend: ``why_not(call)`` and ``run(call)``.

Each is optional and imported in its own file, when it first runs. ``why_not`` refuses whatever the library computes
wrongly, raises for, or has not been checked for here. FlexAttention comes with torch: it is ``raybsa.kernels.flex``.
"""
