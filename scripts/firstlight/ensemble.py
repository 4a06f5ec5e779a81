"""What several runs of one benchmark say: an interval for the median, how much it depends on the start, and whether two sets differ.

The unit is a run, never an I/O: the I/Os of one run depend on each other. numpy and scipy are imported where they are used, because
most commands of the scripts need neither.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import warnings
from collections.abc import Sequence

CONFIDENCE = 0.95
RESAMPLES = 9999
ALPHA = 0.05  # over all rows of a comparison together
LEAST_EFFECT = 0.02  # a smaller difference is not called a change
SAME_WITHIN = 0.05  # an interval of the difference that is wider cannot tell
SENSITIVE = 0.05  # from this sensitivity on, the modes are shown
FEWEST = 8  # runs: with fewer, two sets without any overlap are not yet significant over some rows


@dataclasses.dataclass(frozen=True)
class Interval:
    low: float
    high: float

    def text(self, digits: int = 0) -> str:
        return f"{self.low:.{digits}f} to {self.high:.{digits}f}"


def interval(values: Sequence[float], seed: int) -> Interval:
    """Of the median, by a bias-corrected and accelerated bootstrap over the runs."""
    import numpy
    from scipy import stats

    if len(set(values)) < 2:
        return Interval(values[0], values[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where all resamples agree BCa is undefined, and says so by nan
        found = stats.bootstrap(
            (numpy.asarray(values, float),), numpy.median, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method="BCa", random_state=seed
        ).confidence_interval
    if math.isnan(found.low) or math.isnan(found.high):
        return Interval(min(values), max(values))
    return Interval(float(found.low), float(found.high))


def ratio_interval(above: Sequence[float], below: Sequence[float], seed: int) -> Interval:
    """Of the ratio of two medians: both sides are resampled."""
    import numpy

    random = numpy.random.default_rng(seed)
    medians = [
        numpy.median(random.choice(numpy.asarray(values, float), (RESAMPLES, len(values))), axis=1) for values in (above, below)
    ]
    low, high = numpy.quantile(medians[0] / medians[1], ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(float(low), float(high))


def sensitivity(values: Sequence[float]) -> float:
    """How much a figure depends on the start: the distance between the 10th and the 90th percentile of the runs, as a part of the median."""
    if len(values) < 2:
        return 0.0
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return (tenths[8] - tenths[0]) / statistics.median(values)


def modes(values: Sequence[float]) -> list[list[float]]:
    """The runs, divided at the largest gap if it is far larger than the others and each side has a tenth of the runs; the faster ones first."""
    ordered = sorted(values)
    gaps = [after - before for before, after in zip(ordered, ordered[1:])]
    if not gaps:
        return [ordered]
    at = max(range(len(gaps)), key=gaps.__getitem__) + 1
    each = math.ceil(len(ordered) / 10)
    if gaps[at - 1] > 5 * statistics.median(gaps) and min(at, len(ordered) - at) >= max(2, each):
        return [ordered[at:], ordered[:at]]
    return [ordered]


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    before: Sequence[float]
    after: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Change:
    name: str
    before: float  # medians
    after: float
    ratio: Interval
    p: float  # corrected for the number of rows
    verdict: str  # faster, slower, same, unknown
    needed: int  # of `unknown`: runs of each side with which an effect of LEAST_EFFECT would be found

    @property
    def text(self) -> str:
        low, high = (100 * abs(bound - 1) for bound in (self.ratio.low, self.ratio.high))
        if self.verdict in ("faster", "slower"):
            return f"{self.verdict} {min(low, high):.1f} to {max(low, high):.1f} %"
        if self.verdict == "same":
            return f"same within {max(low, high):.1f} %"
        return f"cannot tell, {self.needed} runs of each needed"


def p_value(before: Sequence[float], after: Sequence[float], seed: int) -> float:
    """That both sets are draws of one distribution: a permutation test finds another mean, a Kolmogorov-Smirnov test another shape."""
    import numpy
    from scipy import stats

    if len(before) < 2 or len(after) < 2:
        return 1.0
    mean = stats.permutation_test(
        (numpy.asarray(before, float), numpy.asarray(after, float)), lambda one, other, axis: numpy.mean(one, axis=axis) - numpy.mean(other, axis=axis),
        vectorized=True, n_resamples=RESAMPLES, random_state=seed,
    ).pvalue  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal values: the exact distribution is replaced by an approximation
        shape = stats.ks_2samp(before, after).pvalue
    return min(1.0, 2 * min(float(mean), float(shape)))


def holm(values: Sequence[float]) -> list[float]:
    """The p-values as they are when that many were looked at [Holm 1979]."""
    found = [0.0] * len(values)
    largest = 0.0
    for rank, at in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[at]))
        found[at] = largest
    return found


def runs_needed(rows: Sequence[Sequence[float]]) -> int:
    """Runs of each side with which LEAST_EFFECT is found four times of five, from the spread of these."""
    spread = max((statistics.stdev(values) / statistics.mean(values) for values in rows if len(values) > 1), default=0.0)
    return max(FEWEST, math.ceil(2 * ((1.96 + 0.84) * spread / LEAST_EFFECT) ** 2))


def compare(rows: Sequence[Row], seed: int) -> list[Change]:
    """One verdict a row. A difference must be both significant over all rows and at least LEAST_EFFECT to be called a change."""
    corrected = holm([p_value(row.before, row.after, seed) for row in rows])
    found = []
    for row, p in zip(rows, corrected):
        before, after = statistics.median(row.before), statistics.median(row.after)
        ratio = ratio_interval(row.after, row.before, seed)
        few = min(len(row.before), len(row.after)) < FEWEST
        if p < ALPHA and abs(after / before - 1) >= LEAST_EFFECT and not few:
            verdict = "faster" if after > before else "slower"
        elif max(abs(ratio.low - 1), abs(ratio.high - 1)) <= SAME_WITHIN and not few:
            verdict = "same"
        else:
            verdict = "unknown"
        needed = max(runs_needed((row.before, row.after)), 2 * min(len(row.before), len(row.after)) if not few else 0)
        found.append(Change(row.name, before, after, ratio, p, verdict, needed))
    return found
