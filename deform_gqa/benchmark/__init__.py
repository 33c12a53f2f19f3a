"""What ``tools/benchmark.py`` runs: suites of cases, one run loop, one writer.

``core`` holds the loop, the report and the figures; ``ops``, ``models`` and
``dataloader`` what is measured; ``compare`` what became slower; ``gqa_sweep`` measures
ops and models over the number of kv heads. The op suite imports torch and numpy alone
(matplotlib and rich where they are installed), so that kernels can be measured on a
machine without any mm package.
"""
