"""Other ways to predict with adapters, to compare curves with. One skeleton for all: `base.Method`."""
