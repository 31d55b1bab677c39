"""95 % confidence intervals of shares, of the difference of two shares of the same samples, and of means.

One share of n samples, k of them: Wilson's score interval (1927), with z = 1.96:

    (k + z^2 / 2 +- z sqrt(k (n - k) / n + z^2 / 4)) / (n + z^2)

Two shares of the same samples, a of which count in both, b in the first alone, c in the second alone, d in neither:
Newcombe's "square and add" of the two Wilson intervals (Statistics in Medicine 17, 1998, method 10), with the correlation

    phi = (a d - b c) / sqrt((a + b) (c + d) (a + c) (b + d)),   whose numerator is lowered by n / 2, to 0 at least, if above 0.

Both hold for few samples and for shares near 0 and 1, where intervals of the normal distribution do not. A mean of n values has that
interval: mean +- z s / sqrt(n), with their sample deviation s.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959963984540054


@dataclass(frozen=True)
class Share:
    """So many of so many samples."""

    count: int
    samples: int

    @property
    def value(self) -> float:
        """The share, from 0 to 1."""
        return self.count / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval."""
        k, n = self.count, self.samples
        middle, reach = k + _Z**2 / 2, _Z * math.sqrt(k * (n - k) / n + _Z**2 / 4)
        return max(0.0, (middle - reach) / (n + _Z**2)), min(1.0, (middle + reach) / (n + _Z**2))


@dataclass(frozen=True)
class Mean:
    """The mean of so many samples' values.

    Attributes:
        value: the mean.
        error: its standard error, s / sqrt(n); of one sample it is not known, and 0 stands here.
        samples: how many.
    """

    value: float
    error: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of values, one a sample."""
        n = len(values)
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0, n)

    @property
    def interval(self) -> tuple[float, float]:
        """That of the normal distribution."""
        return self.value - _Z * self.error, self.value + _Z * self.error


@dataclass(frozen=True)
class PairedDifference:
    """The share of the second less that of the first, of the same samples.

    Attributes:
        both, first, second, neither: how many samples count in both, in one alone, in neither.
    """

    both: int
    first: int
    second: int
    neither: int

    @property
    def samples(self) -> int:
        """How many there are."""
        return self.both + self.first + self.second + self.neither

    @property
    def value(self) -> float:
        """The difference, from -1 to 1."""
        return (self.second - self.first) / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Newcombe's interval."""
        one, two = Share(self.both + self.first, self.samples), Share(self.both + self.second, self.samples)
        (low_one, high_one), (low_two, high_two) = one.interval, two.interval
        phi = self._correlation()

        def added(x: float, y: float) -> float:
            return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

        low = self.value - added(two.value - low_two, high_one - one.value)
        high = self.value + added(high_two - two.value, one.value - low_one)
        return max(-1.0, low), min(1.0, high)

    def _correlation(self) -> float:
        a, b, c, d = self.both, self.first, self.second, self.neither
        product = (a + b) * (c + d) * (a + c) * (b + d)
        if not product:
            return 0.0
        found = a * d - b * c
        return (max(found - self.samples / 2, 0) if found > 0 else found) / math.sqrt(product)
