"""Everything that touches a diffusers model: layouts, the hook, stand-in modules, running a pipeline.

May import diffusers, lesa.runtime and below.
"""
