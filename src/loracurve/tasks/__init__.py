"""From data to batches of tokens: data sets, prompts, encoding, batching."""
