"""Figures and the page that show a run."""
