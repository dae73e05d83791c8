"""Named shapes (batch, queries, keys, heads, kv_heads, head_dim) and options, shared by tests and benches."""

from typing import NamedTuple


class Case(NamedTuple):
    """One attention problem."""

    batch: int
    tokens: int
    kv_tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    options: dict = {}  # noqa: RUF012 - read only

    @property
    def flop(self) -> int:
        """Operations of the two products; half of them for causal."""
        full = 4 * self.batch * self.heads * self.tokens * self.kv_tokens * self.head_dim
        return full // 2 if self.options.get("causal") else full


# The table that the kernel is measured on.
SPEED = {
    f"d{head_dim}_s{tokens}_{'causal' if causal else 'full'}": Case(
        16384 // tokens, tokens, tokens, 2048 // head_dim, 2048 // head_dim, head_dim, {"causal": causal}
    )
    for head_dim in (64, 128)
    for tokens in (2048, 8192)
    for causal in (True, False)
}

# Ragged sizes, grouped queries, windows and lengths: what must be right, not fast.
CORRECTNESS = {
    "one_key": Case(1, 1, 1, 2, 1, 64),
    "ragged": Case(2, 203, 333, 4, 2, 128),
    "ragged_causal": Case(1, 517, 517, 4, 4, 64, {"causal": True}),
    "more_queries_than_keys": Case(1, 400, 130, 2, 1, 128, {"causal": True}),
    "window": Case(1, 700, 700, 4, 1, 128, {"window": (100, 20)}),
    "causal_window": Case(1, 1000, 1000, 2, 2, 64, {"window": 130, "causal": True}),
    "lengths": Case(3, 300, 400, 2, 2, 128, {"kv_lengths": (400, 129, 1), "query_lengths": (300, 7, 0)}),
    "padded_head_dim": Case(1, 256, 256, 3, 3, 96, {"causal": True}),
}
