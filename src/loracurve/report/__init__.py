"""Figures, tables and pages. It reads files only."""
