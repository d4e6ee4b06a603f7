"""Fused operations of PyTorch: they know tensors, pixels, patches and masks, no network, and belong to none.

NAME.py has an operation's formulas, forward and backward, and a reference that is easy to check; NAME_triton.py its
kernels for CUDA; NAME_numba.py those for a CPU, where PyTorch's own operations are slow. All versions have the same
signature and give the same numbers up to rounding, and any shape goes: tests/test_ops.py holds them together, and
tests/test_views.py those for pixels. Which one runs is decided in operation.py, by the first tensor's device and
dtype, and nowhere else.
"""
