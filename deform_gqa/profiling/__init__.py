"""Measuring from within a process: clock, modules, steps, memory, environment.

Stands below ``deform_gqa.engine`` and ``deform_gqa.benchmark``, which both use it, and
imports torch and numpy alone.
"""
