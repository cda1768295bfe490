"""A run directory from its options to predictions, scans and pages."""
