"""From recorded statistics to a plan: schedule search, linear error model, adaptation to other requests.

numpy only. May import lesa.plans and lesa.forecasters; never torch models, never diffusers.
"""
