"""A run behind HTTP, and a client for points of a curve on a multi-LoRA server."""
