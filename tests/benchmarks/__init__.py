"""Side-by-side measurements that print ratios: `python -m tests.benchmarks.NAME`. Nothing here asserts a time."""
