"""A task of dependent tool calls whose mistakes are seldom told.

A question is `36 of 4729`: the tool `price` tells what item 4729 costs, `multiply` computes the product, and the last
turn is the product. Only some numbers are of items, so that a digit copied wrongly is mostly an error of the tool,
after which the call can be repeated. A model needs the right next turn after states that its own mistakes lead to.
"""

from __future__ import annotations

from benchmarks.shop import PRICES, Shop
from gold.demo.calculator import multiply


def price(item: int) -> int:
    """Tells the price of an item.

    Args:
        item: The number of the item.
    """
    found = PRICES.get(int(item))
    if found is None:
        raise LookupError("no such item")
    return found


class Orders(Shop):
    """See above."""

    name = "orders"

    def __init__(self, repairs: bool = True) -> None:
        super().__init__([price, multiply], repairs)

    def asked_with(self, item: int) -> dict[str, int]:
        """See ``Shop``."""
        return {"item": item}
