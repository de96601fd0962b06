"""Kept beside pyproject.toml because an optional C++ extension cannot be declared there."""

from setuptools import setup

setup()
