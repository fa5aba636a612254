from raybsa.kernels.reference import run, why_not  # noqa: F401
