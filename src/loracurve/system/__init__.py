"""Ground floor: errors, random streams, files and folders, YAML, options, processes. Knows nothing of curves."""
