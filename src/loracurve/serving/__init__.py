"""A run behind HTTP, and a client for points of a curve on a multi-LoRA server."""

from loracurve.system.moved import names

__getattr__ = names(__name__)
