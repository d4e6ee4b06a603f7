"""Fused operations, each beside the obvious version of the same signature that it must agree with."""
