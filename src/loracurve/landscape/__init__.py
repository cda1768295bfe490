"""The loss along and around paths through LoRA space."""
