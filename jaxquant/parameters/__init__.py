"""Trees of parameters: their paths, the rules that choose among them, and what they take in memory."""
