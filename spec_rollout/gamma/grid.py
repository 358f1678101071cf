"""A time surface over rows × tokens, fitted to noisy measurements so that more work never looks cheaper."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

FAR = 1024
"""How many times beyond the last measured point the straight extension of the surface reaches."""


class MonotoneGrid:
    """Seconds as a bilinear function of (rows, tokens), non-decreasing in both, from positive measurements.

    Noise is smoothed by isotonic regression of log seconds. Cells that the product of the measured rows and measured
    tokens lacks are read off a curve over rows * tokens. Beyond the grid the surface goes on with the slope of its
    last segment; below it, and along an axis with a single point, it stays flat.
    """

    def __init__(self, cells: Mapping[tuple[int, int], float]):
        """`cells` are seconds by (rows, tokens)."""
        rows = np.array(sorted({rows for rows, _ in cells}), dtype=float)
        tokens = np.array(sorted({tokens for _, tokens in cells}), dtype=float)
        self.last_rows, self.first_tokens = rows[-1], tokens[0]
        table = np.exp(monotone(np.log(_complete(cells, rows, tokens))))  # [rows, tokens]
        self._tokens, table = _extend(tokens, table)
        self._rows, table = _extend(rows, table.T)
        self._table = table.T  # [rows + 1, tokens + 1]

    def at(self, rows: float, tokens: np.ndarray) -> np.ndarray:
        """Seconds of passes with `rows` rows and each of `tokens` [N] tokens per row."""
        low = min(max(int(np.searchsorted(self._rows, rows)) - 1, 0), len(self._rows) - 2)
        share = (rows - self._rows[low]) / (self._rows[low + 1] - self._rows[low])
        share = min(max(share, 0.0), 1.0)
        return np.interp(tokens, self._tokens, (1 - share) * self._table[low] + share * self._table[low + 1])


def monotone(table: np.ndarray) -> np.ndarray:
    """`table` [R, T] made non-decreasing along both axes by least squares along one axis and then the other.

    Isotonic regression keeps order (x ≤ y elementwise gives fit(x) ≤ fit(y)), so the second axis leaves the first
    sorted; the running maxima only remove rounding.
    """
    fitted = np.apply_along_axis(non_decreasing, 1, table)
    fitted = np.apply_along_axis(non_decreasing, 0, fitted)
    return np.maximum.accumulate(np.maximum.accumulate(fitted, axis=0), axis=1)


def non_decreasing(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Least-squares non-decreasing fit [N] of `values` [N] by `weights` [N], by default equal (Ayer et al., 1955):
    neighbours in the wrong order share their mean."""
    blocks: list[tuple[float, float, int]] = []  # (mean, weight, length)
    weights = np.ones(len(values)) if weights is None else weights
    for mean, weight in zip(values.tolist(), weights.tolist(), strict=True):
        length = 1
        while blocks and blocks[-1][0] > mean:
            before, heavy, count = blocks.pop()
            mean, weight = (mean * weight + before * heavy) / (weight + heavy), weight + heavy
            length += count
        blocks.append((mean, weight, length))
    return np.repeat([mean for mean, _, _ in blocks], [length for _, _, length in blocks])


def _complete(cells: Mapping[tuple[int, int], float], rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The measured seconds as a full table [R, T]; a missing cell gets what rows * tokens alone would predict."""
    table = np.array([[cells.get((r, t), np.nan) for t in tokens] for r in rows])
    missing = np.isnan(table)
    if missing.any():
        work = np.outer(rows, tokens)
        alike = {n: table[(work == n) & ~missing] for n in np.unique(work[~missing])}
        by_work = MonotoneGrid({(1, n): float(np.exp(np.log(seconds).mean())) for n, seconds in alike.items()})
        table[missing] = by_work.at(1, work[missing])
    return table


def _extend(axis: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A far point on the last axis of `table` [M, N], on the line through the last two, steeper where M is larger."""
    far = axis[-1] * FAR
    slope = np.zeros(len(table))
    if len(axis) > 1:
        slope = np.maximum.accumulate((table[:, -1] - table[:, -2]) / (axis[-1] - axis[-2]))
    beyond = table[:, -1] + slope * (far - axis[-1])
    return np.append(axis, far), np.column_stack([table, beyond])
