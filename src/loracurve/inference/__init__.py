"""Predictions at points of a curve, their average and uncertainty, metrics and calibration."""
