"""Named shapes, shared by tests and benches."""

from typing import NamedTuple


class Case(NamedTuple):
    """One decode step: query heads over a cache of equal or ragged lengths."""

    batch: int
    tokens: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int | None = None
    lengths: tuple[int, ...] | None = None

    def bytes_read(self, bits: int) -> int:
        """Bytes of codes and scales of `bits` an element that a step must read; recent keys count as codes."""
        grids = {16: 0, 8: 8}.get(bits, 8 * self.head_dim // 32)
        return self.batch * self.kv_heads * self.tokens * (2 * self.head_dim * bits // 8 + grids)


# The table that the kernel is measured on.
SPEED = {
    f"b{batch}_s{tokens}": Case(batch, tokens)
    for batch, tokens in ((16, 4096), (128, 8192), (64, 8192), (16, 32768), (64, 4096), (64, 32768))
}
SPEED |= {f"b64_s8192_pages{size}": Case(64, 8192, page_size=size) for size in (64, 256)}

# Ragged lengths, groups, pages: what must be right, not fast.
CORRECTNESS = {
    "one_token": Case(1, 64, 4, 4, 64, lengths=(1,)),
    "ragged": Case(5, 1024, 8, 2, lengths=(1024, 0, 1, 513, 700)),
    "group_of_7": Case(2, 512, 14, 2, 64, lengths=(512, 100)),
    "group_of_16": Case(2, 512, 32, 2, lengths=(512, 65)),
    "paged": Case(3, 768, 32, 8, page_size=128, lengths=(768, 129, 20)),
    "one_sequence": Case(1, 8192),
}
