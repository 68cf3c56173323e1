"""How sure a figure is: bootstrap intervals, and whether a difference between two is real.

An evaluation yields for each prompt what was right and out of how much; a figure is the ratio of
the sums. Prompts are what is drawn anew in a resample, since the outcomes of one prompt belong
together. What prompts cannot tell is how another training seed would have come out: to know that,
train with several.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
LOWER_IS_BETTER = frozenset({"fid", "kid"})  # of the metrics that evaluations know
_RESAMPLES = 2000
_CHUNK = 1 << 24  # outcomes resampled at a time, to bound memory

Outcomes = NDArray[np.float64]
"""(prompts, 2): what was right, and out of how much; 0 of 0 where a metric does not apply."""


@dataclass(frozen=True)
class Figure:
    """A value with its interval at ``CONFIDENCE``."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Difference:
    """b minus a, with its interval and the probability of one as large if a and b were alike."""

    value: float
    low: float
    high: float
    p: float


def ratio(outcomes: Outcomes) -> float:
    """What was right of all there was; nan of nothing."""
    right, total = outcomes.sum(axis=0)
    return float(right / total) if total else float("nan")


def measure(outcomes: Outcomes, seed: int = 0) -> Figure:
    """The ratio with its percentile bootstrap interval over prompts.

    Where all prompts agree, resamples do too and would claim certainty: there it is Wilson's
    score interval for as many prompts. Raises ValueError for outcomes of another shape.
    """
    outcomes = _applicable(outcomes)
    value = ratio(outcomes)
    if not len(outcomes):
        return Figure(value, value, value)
    low, high = _interval(_resample(outcomes, seed))
    if low == high and value in (0.0, 1.0):
        from scipy import stats  # a second, which every actor and command would take

        successes = round(value * len(outcomes))
        wilson = stats.binomtest(successes, len(outcomes)).proportion_ci(CONFIDENCE, "wilson")
        low, high = float(wilson.low), float(wilson.high)
    return Figure(value, low, high)


def difference(a: Outcomes, b: Outcomes, *, paired: bool, seed: int = 0) -> Difference:
    """Of two versions; ``paired`` when row i of both is the same prompt with the same noise.

    The interval is a bootstrap's, p a two-sided permutation test's: outcomes change sides prompt
    by prompt where paired, else prompts are dealt anew.
    """
    if paired and len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} prompts cannot be paired")
    if paired:
        keep = (a[:, 1] > 0) & (b[:, 1] > 0)
        a, b = a[keep], b[keep]
    else:
        a, b = _applicable(a), _applicable(b)
    found = ratio(b) - ratio(a)
    if not (len(a) and len(b)):
        return Difference(found, found, found, float("nan"))
    gaps = _resample(b, seed) - _resample(a, seed if paired else seed + 1)
    low, high = _interval(gaps)
    by_chance = _swap(a, b, seed) if paired else _deal(a, b, seed)
    at_least = int((np.abs(by_chance) >= abs(found) - 1e-12).sum())
    return Difference(found, low, high, (1 + at_least) / (1 + len(by_chance)))


def holm(probabilities: Sequence[float]) -> list[float]:
    """Holm's correction: what each would be if it stood for the whole family; nan stays."""
    adjusted = np.array(probabilities, float)
    known = np.flatnonzero(~np.isnan(adjusted))
    order = known[np.argsort(adjusted[known])]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(adjusted[order] * factors), 1.0)
    return [float(p) for p in adjusted]


def _applicable(outcomes: Outcomes) -> Outcomes:
    if outcomes.ndim != 2 or outcomes.shape[1] != 2:
        raise ValueError(f"outcomes have shape {outcomes.shape}, not (prompts, 2)")
    return outcomes[outcomes[:, 1] > 0]


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def _chunks(count: int) -> list[int]:
    """How many resamples of ``count`` outcomes to make at a time."""
    size = max(1, _CHUNK // max(1, count))
    return [min(size, _RESAMPLES - start) for start in range(0, _RESAMPLES, size)]


def _resample(outcomes: Outcomes, seed: int) -> NDArray[np.float64]:
    """(_RESAMPLES,) ratios of as many prompts drawn with replacement; the same ones by seed."""
    rng = np.random.default_rng([seed, len(outcomes)])
    found = []
    for size in _chunks(len(outcomes)):
        sums = outcomes[rng.integers(len(outcomes), size=(size, len(outcomes)))].sum(axis=1)
        found.append(sums[:, 0] / sums[:, 1])
    return np.concatenate(found)


def _swap(a: Outcomes, b: Outcomes, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng([seed, 1])
    found = []
    for size in _chunks(len(a)):
        swapped = rng.integers(2, size=(size, len(a)), dtype=np.int8).astype(np.float64)
        first = a.sum(axis=0) + swapped @ (b - a)
        second = b.sum(axis=0) + swapped @ (a - b)
        found.append(second[:, 0] / second[:, 1] - first[:, 0] / first[:, 1])
    return np.concatenate(found)


def _deal(a: Outcomes, b: Outcomes, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng([seed, 2])
    both = np.concatenate([a, b])
    everything = both.sum(axis=0)
    found = []
    for _ in range(_RESAMPLES):
        first = both[rng.permutation(len(both))[: len(a)]].sum(axis=0)
        second = everything - first
        found.append(second[0] / second[1] - first[0] / first[1])
    return np.array(found)
