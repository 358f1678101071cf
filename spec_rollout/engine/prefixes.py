"""Which of many sequences of tokens begins as another one does."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item")
WIDTH = 4
"""Bytes of a packed token."""


def packed(tokens: Sequence[int]) -> bytes:
    """`tokens` as bytes in whose order sequences sort as their tokens do."""
    return np.asarray(tokens, dtype=">u4").tobytes()


def common(a: bytes, b: bytes) -> int:
    """Tokens at the beginning of the packed `a` and `b` that are the same."""
    size = min(len(a), len(b))
    differ = np.frombuffer(a[:size], dtype=">u4") != np.frombuffer(b[:size], dtype=">u4")
    return int(differ.argmax()) if differ.any() else size // WIDTH


class Sequences(Generic[Item]):
    """Packed tokens in their order, each with an item. What begins most alike stands side by side."""

    def __init__(self):
        self._keys: list[bytes] = []
        self._items: list[Item] = []

    def add(self, tokens: bytes, item: Item) -> None:
        place = bisect_right(self._keys, tokens)
        self._keys.insert(place, tokens)
        self._items.insert(place, item)

    def remove(self, tokens: bytes, item: Item) -> None:
        """`item`, which was added with `tokens`, is there no more."""
        place = self._items.index(item, bisect_left(self._keys, tokens))
        del self._keys[place], self._items[place]

    def most_alike(self, tokens: bytes) -> tuple[Item | None, int]:
        """The item that has the most tokens at its beginning in common with `tokens`, and how many."""
        place = bisect_right(self._keys, tokens)
        beside = [(common(self._keys[i], tokens), i) for i in (place - 1, place) if 0 <= i < len(self._keys)]
        size, i = max(beside, default=(0, None))
        return (None, 0) if i is None else (self._items[i], size)

    def longest_within(self, tokens: bytes) -> tuple[Item | None, int]:
        """The item with the most tokens of those with which `tokens` begins whole, and how many they are."""
        place = bisect_right(self._keys, tokens)
        while place:
            size = common(self._keys[place - 1], tokens)
            if size * WIDTH == len(self._keys[place - 1]):
                return self._items[place - 1], size
            place = bisect_right(self._keys, tokens[: size * WIDTH], 0, place)
        return None, 0
