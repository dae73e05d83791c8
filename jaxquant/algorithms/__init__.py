"""Algorithms that round weights: one paper a file, each a `WeightTransform` made of pure functions."""
