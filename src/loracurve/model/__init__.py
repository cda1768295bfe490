"""A Hugging Face model that carries a curve: layers, ways to run, merging, loading."""

from loracurve.system.moved import names

__getattr__ = names(__name__)
