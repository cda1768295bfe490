"""Suites of methods x tasks x seeds: running, storing, tables."""
