"""A task of dependent tool calls in which a student cannot but make mistakes, and is told each of them.

The question is that of ``orders``, `36 of 4729`, but `price` also wants the store that has the item. A teacher knows
the stores by heart. A student cannot know those of items that it has not met; a call with another store fails, and the
error names the right one. So what it needs most, to call again with what it was told, a teacher that knows never does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.shop import PRICES, Shop, broken
from gold.data import Prompt
from gold.demo.calculator import multiply

ITEMS = 300
"""Those of the catalogue that stores have."""


def stores() -> dict[int, int]:
    """The store of each item: half of them are in store 1, the others in 2 … 9."""
    rng = np.random.default_rng(6)
    numbers = list(PRICES)[:ITEMS]
    return {item: 1 if rng.random() < 0.5 else int(rng.integers(2, 10)) for item in numbers}


STORES = stores()


def price(item: int, store: int) -> int:
    """Tells the price of an item.

    Args:
        item: The number of the item.
        store: The store that has it.
    """
    right = STORES.get(int(item))
    if right is None:
        raise LookupError("no such item")
    if int(store) != right:
        raise LookupError(f"it is in store {right}")
    return PRICES[int(item)]


class Stores(Shop):
    """See above."""

    name = "stores"
    items: Sequence[int] = tuple(STORES)

    def __init__(self, repairs: bool = True) -> None:
        super().__init__([price, multiply], repairs)

    def asked_with(self, item: int) -> dict[str, int]:
        """See ``Shop``."""
        return {"item": item, "store": STORES[item]}

    def known(self, count: int, seed: int) -> list[Prompt]:
        """See ``Shop``; of both splits."""
        return self.questions(self.items, count, np.random.default_rng(seed))

    def failing(self, right: str, rng: np.random.Generator) -> str:
        """See ``Shop``; mostly another store, if the call has one."""
        if '"store"' not in right or rng.random() < 0.3:
            return broken(right, rng)
        before, _, after = right.partition('"store": ')
        others = [store for store in range(1, 10) if store != int(after[0])]
        return f'{before}"store": {rng.choice(others)}{after[1:]}'
