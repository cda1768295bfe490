"""The tables and the page of a suite, from what its store holds."""
