"""From data to batches of tokens: data sets, prompts, encoding, batching."""

from loracurve.system.moved import names

__getattr__ = names(__name__)
