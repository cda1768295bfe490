"""What is tried and not recommended. Nothing imports it: the registered inference method `tunnel` loads it."""
