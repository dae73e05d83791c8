"""Which dimensions a product pairs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Dims:
    """Which dimensions of x and of the weight a product pairs; the others are free.

    Attributes:
        x_contract: contracting dimensions of x, counted from the front.
        w_contract: those of the weight they are summed with, in the same order.
        x_batch: batch dimensions of x.
        w_batch: those of the weight.
    """

    x_contract: tuple[int, ...]
    w_contract: tuple[int, ...]
    x_batch: tuple[int, ...] = ()
    w_batch: tuple[int, ...] = ()

    def x_free(self, rank: int) -> tuple[int, ...]:
        """The free dimensions of x."""
        return tuple(d for d in range(rank) if d not in self.x_contract + self.x_batch)

    def w_free(self, rank: int) -> tuple[int, ...]:
        """The free dimensions of the weight."""
        return tuple(d for d in range(rank) if d not in self.w_contract + self.w_batch)
