"""Benchmarks: `python -m bench` measures streamconv against copying, and against the usual ways to convert."""
