# A base that adds the runtime-benchmark hook to a config that sets no `custom_hooks`
# (a key set by two bases is an error in mmengine; a config with hooks of its own adds
# the dict below to them). Results: runtime_benchmark.md in the log folder of the run.
custom_hooks = [dict(type='RuntimeBenchmarkHook', interval=50, eval_interval=10)]
