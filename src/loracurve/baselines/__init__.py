"""The methods that curves are compared with, one module each."""
