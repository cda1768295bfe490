"""The curve as a value: geometry, shape, control points, gauge, files. Knows no model."""
