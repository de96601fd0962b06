"""Measuring and drawing: several methods on the same noise, images, curves, plans.

May import everything but lesa.cli; needs the extra [demo].
"""
