"""Where things lie."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""the checkout"""
PREPARED = ROOT.parent / "shared" / "data"
"""prepared data sets beside the checkout; tests that need them are skipped without them"""
