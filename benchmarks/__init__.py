"""Ratios against limits and peers, each of one run: `python -m benchmarks`; how cost grows: `python -m benchmarks.scaling`."""
