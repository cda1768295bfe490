"""Predictions at points of a curve, their average and uncertainty, metrics and calibration."""

from loracurve.system.moved import names

__getattr__ = names(__name__)
