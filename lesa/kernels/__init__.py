"""Triton kernels and their launchers, reached through lesa.ops only.

May import torch and triton; nothing of lesa.
"""
