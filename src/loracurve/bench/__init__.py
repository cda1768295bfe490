"""Suites: methods x tasks x seeds, with a store of results and tables."""
