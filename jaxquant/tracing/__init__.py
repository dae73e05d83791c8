"""Programs of unmodified models: traced, read, and evaluated on quantized weights."""
