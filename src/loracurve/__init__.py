"""Bayesian fine-tuning of language models with curves of LoRA adapters."""
