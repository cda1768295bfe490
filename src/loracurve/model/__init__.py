"""A Hugging Face model that carries a curve: layers, ways to run, merging, loading."""
