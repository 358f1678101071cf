"""The chance that a guess comes true, from the probability that the draft itself gave it."""

from __future__ import annotations

import math

import numpy as np

EDGES = np.append(1 / (1 + np.exp(-np.linspace(-4.0, 7.0, 12))), 1.001)
"""Between the classes of probability that are told apart: even in log-odds, from 0.018 to 0.999. In the last class is
what is no probability, NaN too; it has no chance."""
CLASSES = len(EDGES) + 1
SHARED_NOISE = 4.0
"""Odds that a guess comes true, beside those of its probability, before anything was judged: draft and policy draw
with the same noise, so they agree more often than either would repeat itself. Measured: 2 to 20 at probabilities of
0.2 and 0.4, with a young and an old head."""
EXPECTED = np.append(1 / (1 + np.exp(-np.linspace(-4.5, 7.5, CLASSES - 1)) / SHARED_NOISE), 0.0)
DEPTHS = 16
"""Guesses told apart; further ones share the last table."""
PRIOR_WEIGHT = 4.0
"""Outcomes that what is expected of a class counts for."""
MEMORY = 400.0
"""Steps that one row's outcomes count for; b rows forget √b times as fast. How well a draft knows itself changes more
slowly than how good it is."""
MOST = 0.995
"""Nothing is certain; so chances of a chain fall with every guess."""


class Confidence:
    """Calibrates a draft's probabilities by what came of its guesses, with exponential forgetting.

    For each place of a guess and class of probability it counts guesses judged and come true. Of a class little is
    known about, what the place before knows is expected, and at the first place EXPECTED.
    """

    def __init__(self):
        self._judged = np.zeros((DEPTHS, CLASSES))
        self._true = np.zeros((DEPTHS, CLASSES))
        self._table: np.ndarray | None = None

    def chances(self, place: int, probabilities: np.ndarray) -> np.ndarray:
        """[B] chances that guesses come true if those before them do, the `place`-th (from 0) of each row, to which
        the draft gave `probabilities` [B]."""
        table = self._table if self._table is not None else self.table()
        return table[min(place, DEPTHS - 1)].take(EDGES.searchsorted(probabilities))

    def observe(self, probabilities: np.ndarray, judged: np.ndarray, true: np.ndarray) -> None:
        """Count a step: `probabilities` [B, γ], which guesses were `judged` and which came `true`, [B, γ] bool."""
        places = np.minimum(np.arange(probabilities.shape[1]), DEPTHS - 1)
        cells = (places * CLASSES + EDGES.searchsorted(probabilities))[judged]
        keep = math.exp(-math.sqrt(len(probabilities)) / MEMORY)
        size = DEPTHS * CLASSES
        counts = np.bincount(cells, minlength=size), np.bincount(cells, true[judged], size)
        self._judged = keep * self._judged + counts[0].reshape(DEPTHS, CLASSES)
        self._true = keep * self._true + counts[1].reshape(DEPTHS, CLASSES)
        self._table = None

    def table(self) -> np.ndarray:
        """Chances [DEPTHS, CLASSES] by place and class."""
        if self._table is None:
            table = np.empty((DEPTHS, CLASSES))
            expected = EXPECTED
            weights = self._judged + PRIOR_WEIGHT
            for place in range(DEPTHS):
                expected = table[place] = (self._true[place] + PRIOR_WEIGHT * expected) / weights[place]
            table[:, -1] = 0.0
            self._table = np.minimum(table, MOST)
        return self._table

    def reset(self, weight: float) -> None:
        """Let what was observed count for at most `weight` outcomes per place and class."""
        scale = weight / np.maximum(self._judged, max(weight, 1e-9))
        self._judged, self._true, self._table = self._judged * scale, self._true * scale, None

    def to_json(self) -> dict:
        return {"judged": self._judged.tolist(), "true": self._true.tolist()}

    @classmethod
    def from_json(cls, state: dict) -> Confidence:
        """What `to_json` saved.

        Raises:
            ValueError: the state is not one that this version saves.
        """
        confidence = cls()
        confidence._judged, confidence._true = np.array(state["judged"]), np.array(state["true"])
        if confidence._judged.shape != (DEPTHS, CLASSES) or confidence._true.shape != (DEPTHS, CLASSES):
            raise ValueError(
                f"A saved confidence has shape {confidence._judged.shape}, this version keeps {(DEPTHS, CLASSES)}: "
                "start without it."
            )
        return confidence
