"""lesa.fit: record requests, plan, run candidates, refine.

May import lesa.models and below and lesa.metrics; never lesa.training.
"""
