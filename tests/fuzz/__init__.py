"""Fuzzing of every kind of file that the library reads from strangers (`make fuzz`)."""
