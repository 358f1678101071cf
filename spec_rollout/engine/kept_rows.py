"""Rows of earlier rollouts of the same policy, from which the turns that extend them go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spec_rollout.engine.kept_slot import KeptSlot
from spec_rollout.engine.prefixes import Sequences, packed
from spec_rollout.records import Completion, Request


@dataclass(eq=False)
class KeptRow:
    """A finished row of the request `index`: what its slot held of all its tokens but the last, and the drafter with
    what it keeps of them. Its packed `tokens` are not known before its rollout is over."""

    index: int
    slot: KeptSlot
    draft: tuple[object, KeptSlot | None]
    tokens: bytes = b""

    def __post_init__(self):
        self.bytes = self.slot.bytes + (self.draft[1].bytes if self.draft[1] is not None else 0)


class KeptRows:
    """Finished rows, the oldest first; `bytes` is what they take on the policy's device.

    They are good for one `state` of the policy: in another one its keys and values are others.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Give all memory back."""
        self.state: object = None
        self.bytes = 0
        self._rows: dict[KeptRow, None] = {}
        self._sequences: Sequences[KeptRow] = Sequences()

    def __contains__(self, row: object) -> bool:
        return row in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def open(self, state: object) -> None:
        """A rollout begins, of a policy in `state`; what another one left is dropped."""
        if state != self.state:
            self.clear()
            self.state = state

    def find(self, tokens: bytes, whole: bool) -> tuple[KeptRow | None, int]:
        """The row whose beginning has the most in common with the packed `tokens`, and how many they are; with `whole`
        only one of which all are in `tokens`."""
        return self._sequences.longest_within(tokens) if whole else self._sequences.most_alike(tokens)

    def add(self, row: KeptRow) -> None:
        self._rows[row] = None
        self.bytes += row.bytes

    def drop(self, row: KeptRow) -> None:
        del self._rows[row]
        self.bytes -= row.bytes
        if row.tokens:
            self._sequences.remove(row.tokens, row)

    def shrink(self, most: int) -> None:
        """Drop the oldest rows until they take `most` bytes or less."""
        while self._rows and self.bytes > most:
            self.drop(next(iter(self._rows)))

    def close(self, requests: Sequence[Request], completions: Sequence[Completion]) -> None:
        """The rollout that `open` began is over, with these `completions`: its rows can be found from here on."""
        for row in [row for row in self._rows if not row.tokens]:
            row.tokens = packed([*requests[row.index].prompt, *completions[row.index].token_ids])
            while (older := self._sequences.longest_within(row.tokens)[0]) is not None:
                self.drop(older)
            self._sequences.add(row.tokens, row)
