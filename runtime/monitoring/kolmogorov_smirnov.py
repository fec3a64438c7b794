"""Kolmogorov and Smirnov's test of two samples, exact, in NumPy: SciPy is not on a device.

Whether ``N`` and ``M`` values may come from one distribution. It knows nothing about what they
are; tests hold it to ``scipy.stats.ks_2samp(method="exact")``.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]


def steps_apart(one: Floats, other: Floats) -> int:
    """How far two sorted samples ``[N]`` and ``[M]`` are apart, in units of ``1 / (N M)``.

    That is the largest difference of their empirical distribution functions, as a whole number.
    """
    values = np.concatenate([one, other])
    below_one = np.searchsorted(one, values, side="right") * len(other)
    below_other = np.searchsorted(other, values, side="right") * len(one)
    return int(np.abs(below_one - below_other).max())


def p_value(steps: int, n: int, m: int) -> float:
    """How often samples of ``n`` and ``m`` values of one distribution are ``steps`` or more apart.

    Merging two samples in order of value is a path on a grid from (0, 0) to (n, m), each as likely
    as any other; ``steps`` apart means that it leaves a band around the diagonal. Paths that have
    left it are counted row by row (Hodges 1957), as shares of all of a row, and only ever added:
    no difference of large numbers spoils a small p. Exact for continuous distributions; where
    values are equal it errs on the side of a larger p.
    """
    n, m = min(n, m), max(n, m)
    if steps <= 0:
        return 1.0
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + m + 1)))])
    columns = np.arange(m + 1)
    left = np.ones(1)
    scale = 0.0
    for row in range(n + 1):
        paths = log_factorial[row + columns] - log_factorial[row] - log_factorial[columns]
        new = np.exp(paths - paths[-1])
        first = max(0, (row * m - steps) // n + 1)
        last = min(m, -(-(row * m + steps) // n) - 1)
        if row:
            from_left = new[first - 1] if first else 0.0
            within = np.cumsum(left[first : last + 1] * np.exp(scale - paths[-1]))
            new[first : last + 1] = from_left + within
        else:
            new[first : last + 1] = 0.0
        left, scale = new, paths[-1]
    return float(min(1.0, left[-1]))
