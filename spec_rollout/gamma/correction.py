"""How much longer real steps take than the calibration says, learned while decoding."""

from __future__ import annotations

import math

import numpy as np

ROW_BUCKETS = 25
"""Half octaves of rows: 1, 1.4, 2, 2.8, 4 … 4096."""
TOKENS = 16
"""Tokens per row with a cell of their own; wider passes share the last one."""
CALIBRATION_VARIANCE = 0.2**2
"""Of log seconds in one cell: how far a calibrated time may be off beside the others."""
NOISE = 0.08**2
"""Of one step's log seconds."""
COMMON_DRIFT = 1e-4
"""Variance that the common factor regains per step: other load on the machine, a growing context."""
FORGETTING = 3e-4
"""Share of its first variance that a cell regains per step, so that what was measured long ago is measured again."""
RECENT = 5
"""Steps whose median counts."""
ROW_REACH, TOKEN_REACH = 4.0, 1.0
"""How far a measurement speaks for its neighbours, in row buckets and in octaves of tokens."""
LEAST_PULL = 0.1
"""How far a cell's log factor must follow its own deviation to be set by it."""
UNSURE = 0.25
"""Standard error of a deviation taken from neighbours, as a share of it."""

_rows = np.arange(ROW_BUCKETS)
_octaves = np.log2(np.arange(1, TOKENS + 1))
_ROW_KERNEL = np.exp(-np.abs(_rows[:, None] - _rows) / ROW_REACH)
_TOKEN_KERNEL = np.exp(-np.abs(_octaves[:, None] - _octaves) / TOKEN_REACH)


def row_bucket(rows: int) -> int:
    return min(round(2 * math.log2(max(rows, 1))), ROW_BUCKETS - 1)


class Correction:
    """Log factor on the calibrated seconds, for each row bucket and number of tokens.

    factor = common + deviation of the cell. The first steps set the common factor. From then on a Kalman filter with a
    diagonal covariance tracks both: a surprise goes to whichever is less certain, so a new cell learns its own
    deviation within a few steps, and a machine that slows down as a whole moves all cells. A cell not measured takes a
    kernel average of its neighbours' deviations.

    An interrupted step is only ever slower: the first step at another number of tokens (it may pay the draft's
    catch-up or a compilation) counts with the faster of itself and its successor, later ones with the median of
    five. A surprise is clipped at three standard deviations and then makes nothing more certain. Only where the
    calibration must have been disturbed, it is forgotten: in a cell that is not certain yet, if a step is faster than
    that, or five in a row are slower.
    """

    def __init__(self):
        self._common, self._common_variance = 0.0, 0.0
        self._deviation = np.zeros((ROW_BUCKETS, TOKENS))
        self._variance = np.full((ROW_BUCKETS, TOKENS), CALIBRATION_VARIANCE)
        self._recent: list[float] = []
        self._recent_tokens = 0
        self._predictions: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}  # since the last change

    @property
    def learned(self) -> bool:
        return self._common_variance > 0

    def predict(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Log factor for passes of `rows` rows, and the standard error of what is not common; [TOKENS] each."""
        factor, error, _ = self._parts(row_bucket(rows))
        return factor, error

    def observe(self, rows: int, tokens: int, log_ratio: float) -> None:
        """A step of `rows` rows and `tokens` tokens each took exp(`log_ratio`) times the calibrated seconds."""
        if tokens != self._recent_tokens:
            self._recent, self._recent_tokens = [], tokens
        self._recent = [*self._recent[1 - RECENT :], log_ratio]
        if len(self._recent) < 2:
            return
        typical = sorted(self._recent)[(len(self._recent) - 1) // 2]
        if self._common_variance == 0:
            self._common, self._common_variance = typical, COMMON_DRIFT
            self._predictions.clear()
        self._update((row_bucket(rows), min(tokens, TOKENS) - 1), typical)

    def _update(self, cell: tuple[int, int], typical: float) -> None:
        """A cell's log factor was measured as `typical`."""
        predicted = float(self._parts(cell[0])[0][cell[1]])
        surprise, variance = typical - predicted, float(self._variance[cell])
        disturbed = self._disturbed(surprise, variance)
        total = self._common_variance + variance + NOISE
        gain, common_gain = (1.0, 0.0) if disturbed else (variance / total, self._common_variance / total)
        limit = math.inf if disturbed else 3 * math.sqrt(total)
        surprise = min(max(surprise, -limit), limit)
        self._common += common_gain * surprise
        if abs(surprise) < limit:
            self._variance[cell] = NOISE if disturbed else variance * (1 - gain)
            self._common_variance *= 1 - common_gain
        self._place(cell, predicted + (gain + common_gain) * surprise)
        self._variance += FORGETTING * (CALIBRATION_VARIANCE - self._variance)
        self._common_variance += COMMON_DRIFT
        self._predictions.clear()

    def _place(self, cell: tuple[int, int], factor: float) -> None:
        """Let the log factor of a cell be `factor`, whatever its neighbours say; as it is where it was hardly measured
        or long ago."""
        self._predictions.clear()
        now, _, pull = (float(part[cell[1]]) for part in self._parts(cell[0]))
        if pull > LEAST_PULL:
            self._deviation[cell] += (factor - now) / pull

    def _parts(self, bucket: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log factors of a row bucket, their standard errors, and how far each moves with its own deviation."""
        if bucket in self._predictions:
            return self._predictions[bucket]
        trust = 1 - self._variance / CALIBRATION_VARIANCE  # [ROW_BUCKETS, TOKENS]
        near = _ROW_KERNEL[bucket]
        weight = (near @ trust) @ _TOKEN_KERNEL
        share = (1 - trust[bucket]) / (weight + 0.1)
        taken = share * ((near @ (trust * self._deviation)) @ _TOKEN_KERNEL)
        factor = self._common + trust[bucket] * self._deviation[bucket] + taken
        error = np.sqrt(self._variance[bucket] / (1 + weight) + (UNSURE * taken) ** 2)
        self._predictions[bucket] = factor, error, trust[bucket] * (1 + share)
        return self._predictions[bucket]

    def _disturbed(self, surprise: float, variance: float) -> bool:
        """Whether the calibration of a cell with `variance` cannot have been right."""
        if variance < CALIBRATION_VARIANCE / 2 or (surprise > 0 and len(self._recent) < RECENT):
            return False
        return abs(surprise) > 3 * math.sqrt(self._common_variance + variance + NOISE)

    def to_json(self) -> dict:
        return {
            "common": [self._common, self._common_variance],
            "deviation": self._deviation.tolist(),
            "variance": self._variance.tolist(),
            "recent": list(self._recent),
            "recent_tokens": self._recent_tokens,
        }

    @classmethod
    def from_json(cls, state: dict) -> Correction:
        correction = cls()
        correction._common, correction._common_variance = state["common"]
        correction._deviation = np.array(state["deviation"])
        correction._variance = np.array(state["variance"])
        correction._recent, correction._recent_tokens = list(state["recent"]), state["recent_tokens"]
        shape = (ROW_BUCKETS, TOKENS)
        if correction._deviation.shape != shape or correction._variance.shape != shape:
            raise ValueError(
                f"A saved correction has shape {correction._deviation.shape}, this version keeps {shape}: remove the "
                "file and calibrate again."
            )
        return correction
