"""Fits linear models of durations: least squares of the *relative* error with non-negative coefficients.

Durations differ by orders of magnitude, so each row is divided by its duration. Sums over the rows are all that is
kept, which makes a fit cheap enough to be repeated while an engine runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import msgspec

_REDUNDANT = 1e-9


class Sums(msgspec.Struct):
    """Sums over measured rows of one width. `weight`: the number of rows, less what was forgotten; `products`: of each
    two factors, row by row; `totals`: of each factor."""

    weight: float
    products: list[list[float]]
    totals: list[float]

    @classmethod
    def empty(cls, width: int) -> Sums:
        """No rows yet."""
        return cls(0.0, [[0.0] * width for _ in range(width)], [0.0] * width)

    def add(self, row: Sequence[float], seconds: float, keep: float = 1.0) -> None:
        """Add a measured row. `keep`: the factor by which all earlier rows lose weight."""
        scaled = [value / seconds for value in row]
        self.weight = self.weight * keep + 1.0
        for mine, factor in zip(self.products, scaled, strict=True):
            for place, other in enumerate(scaled):
                mine[place] = mine[place] * keep + factor * other
        self.totals = [total * keep + value for total, value in zip(self.totals, scaled, strict=True)]

    @classmethod
    def together(cls, parts: Sequence[Sums]) -> Sums:
        """The sums over the rows of several; at least one."""
        products = [
            [sum(values) for values in zip(*rows, strict=True)]
            for rows in zip(*(part.products for part in parts), strict=True)
        ]
        totals = [sum(values) for values in zip(*(part.totals for part in parts), strict=True)]
        return cls(sum(part.weight for part in parts), products, totals)

    def solve(self) -> list[float]:
        """The non-negative coefficients with the least sum of squared relative errors; all 0 without rows."""
        width = len(self.totals)
        best, least = [0.0] * width, self.weight
        for columns in (chosen for size in range(1, width + 1) for chosen in combinations(range(width), size)):
            found = self._solve(columns)
            error = self._error(columns, found)
            if min(found) >= 0 and error < least:
                best, least = [0.0] * width, error
                for column, value in zip(columns, found, strict=True):
                    best[column] = value
        return best

    def _error(self, columns: Sequence[int], found: Sequence[float]) -> float:
        crossed = sum(
            a * b * self.products[one][other]
            for one, a in zip(columns, found, strict=True)
            for other, b in zip(columns, found, strict=True)
        )
        return self.weight + crossed - 2 * sum(a * self.totals[c] for c, a in zip(columns, found, strict=True))

    def _solve(self, columns: Sequence[int]) -> list[float]:
        """The normal equations for these columns, scaled, by elimination; 0 for a redundant column."""
        size = len(columns)
        scale = [self.products[column][column] ** 0.5 or 1.0 for column in columns]
        matrix = [
            [self.products[a][b] / scale[i] / scale[j] for j, b in enumerate(columns)] + [self.totals[a] / scale[i]]
            for i, a in enumerate(columns)
        ]
        for pivot in range(size):
            best = max(range(pivot, size), key=lambda place: abs(matrix[place][pivot]))
            matrix[pivot], matrix[best] = matrix[best], matrix[pivot]
            if abs(matrix[pivot][pivot]) < _REDUNDANT:
                continue
            for other in range(size):
                if other != pivot:
                    factor = matrix[other][pivot] / matrix[pivot][pivot]
                    matrix[other] = [a - factor * b for a, b in zip(matrix[other], matrix[pivot], strict=True)]
        return [
            matrix[place][size] / matrix[place][place] / scale[place]
            if abs(matrix[place][place]) >= _REDUNDANT
            else 0.0
            for place in range(size)
        ]
