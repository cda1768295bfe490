"""Points of a curve on a multi-LoRA server, and a client that averages its answers."""

from loracurve.serving.client import NextToken, ServedCurve, ServedText

__all__ = ["NextToken", "ServedCurve", "ServedText"]
