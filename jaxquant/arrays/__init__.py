"""Quantized arrays: number formats, specifications, the maths of rounding, containers and their views."""
