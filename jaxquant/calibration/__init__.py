"""Calibration: statistics of a model's activations, and the walk that quantizes it weight by weight."""
