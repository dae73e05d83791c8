"""Products of activations with quantized weights, by a kernel or by XLA."""
