"""`loracurve serve`: a run behind HTTP. Modules that need the extra `serve` are imported only when it starts."""
