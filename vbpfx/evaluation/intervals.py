"""95 % confidence intervals of shares, of the difference of two shares of the same samples, and of means.

For a share of k in n samples we use Wilson's score interval (1927), with z = 1.96:

    (k + z^2 / 2 +- z sqrt(k (n - k) / n + z^2 / 4)) / (n + z^2)

For two shares of the same samples, let a be the number of samples that count in both, b in the first only, c in the
second only, and d in neither. We use Newcombe's "square and add" of the two Wilson intervals (Statistics in Medicine
17, 1998, method 10), with the correlation

    phi = (a d - b c) / sqrt((a + b) (c + d) (a + c) (b + d)).

If the numerator of phi is positive, n / 2 is subtracted from it, but it does not become negative.

Both intervals hold for few samples and for shares near 0 and 1, where intervals of the normal distribution fail. For
the mean of n values with sample deviation s we use that of the normal distribution: mean +- z s / sqrt(n).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959963984540054


@dataclass(frozen=True)
class Share:
    """A share: ``count`` of ``samples`` samples."""

    count: int
    samples: int

    @property
    def value(self) -> float:
        """The share, from 0 to 1."""
        return self.count / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        k, n = self.count, self.samples
        middle, reach = k + _Z**2 / 2, _Z * math.sqrt(k * (n - k) / n + _Z**2 / 4)
        return max(0.0, (middle - reach) / (n + _Z**2)), min(1.0, (middle + reach) / (n + _Z**2))


@dataclass(frozen=True)
class Mean:
    """The mean of one value per sample.

    Attributes:
        value: the mean.
        error: the standard error of the mean, s / sqrt(n); 0 for a single sample, where it is not known.
        samples: the number of samples.
    """

    value: float
    error: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Return the mean of values, one per sample."""
        n = len(values)
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0, n)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the normal distribution."""
        return self.value - _Z * self.error, self.value + _Z * self.error


@dataclass(frozen=True)
class PairedDifference:
    """The second share minus the first, where both are shares of the same samples.

    Attributes:
        both: the number of samples that count in both shares.
        first: the number that counts only in the first.
        second: the number that counts only in the second.
        neither: the number that counts in neither.
    """

    both: int
    first: int
    second: int
    neither: int

    @property
    def samples(self) -> int:
        """The number of samples."""
        return self.both + self.first + self.second + self.neither

    @property
    def value(self) -> float:
        """The difference, from -1 to 1."""
        return (self.second - self.first) / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Newcombe's 95 % interval."""
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
