"""Checkpoints on disk: read leaf by leaf, written safely, never larger in memory than they must be."""
