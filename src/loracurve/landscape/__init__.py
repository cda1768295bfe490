"""The loss along and around paths through LoRA space."""

from loracurve.system.moved import names

__getattr__ = names(__name__)
