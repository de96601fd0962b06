"""Triton kernels and their launchers; only `lesa.ops` reaches them."""
