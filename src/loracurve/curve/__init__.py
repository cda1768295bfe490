"""The curve as a value: geometry, shape, control points, gauge, files. Knows no model."""

from loracurve.system.moved import names

__getattr__ = names(__name__)
