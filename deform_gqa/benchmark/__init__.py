"""Measuring: cases, timers, peers and reports of ``tools/benchmark.py``.

The op suite imports torch alone (matplotlib and rich where they are installed), so
that kernels can be measured on a machine without any mm package.
"""
