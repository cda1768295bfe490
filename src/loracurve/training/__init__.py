"""Fitting anchors and curves: objective, perturbation, step, loop, checkpoints, Trainer."""

from loracurve.system.moved import names

__getattr__ = names(__name__)
