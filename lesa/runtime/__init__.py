"""What happens during a request: clock, feature history, plan runner, error checks, statistics of use.

May import lesa.plans, lesa.planner, lesa.forecasters and lesa.ops; never diffusers.
"""
