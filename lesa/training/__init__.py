"""lesa.train: the paper's stage-aware predictor and its two training stages.

May import lesa.models and below; never lesa.fitting.
"""
