"""Kernel benchmarks: named masks, timing, and rows that are only written once the oracle agrees."""
