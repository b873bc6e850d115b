"""Paired tests over seeds: which contenders these seeds tell apart, by how much, and what it would take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd

from bnlight.compare.evidence.repeats import Meeting
from bnlight.compare.stats import Cell, decimals, number

ALPHA = 0.05
POWER = 0.8
MOST = 1000  # more seeds than anybody will run
FEW = 5  # below this many seeds, a t test rests on the normality of its differences
EXACT = 10  # up to here all sign flips are tried: 2 ** 10

FAMILY = (
    "Differences are paired over common seeds and tested by Student's t. Which contender is best is known only "
    "afterwards, so p is corrected by Holm over all pairs of one condition; told apart means p <= 0.05 after that. The "
    "interval of a difference is its own and not corrected."
)
FEW_SEEDS = (
    f"With fewer than {FEW} common seeds a paired t test rests on the differences being normal, which so few "
    "cannot show; the exact sign-flip test does not, but its p cannot fall below 2 / 2^n."
)


@dataclass(frozen=True)
class Pair:
    """Two contenders under one condition, over the n seeds on which both finished; each at its chosen setting.

    - `difference`: the mean over seeds of `better` minus `worse`, turned so that better is positive;
    - `low`, `high`: its 95 % interval, `difference ± t(0.975, n - 1) * sd / sqrt(n)`;
    - `effect`: Hedges' g_z, that is Cohen's `d_z = difference / sd` of the differences times the small-sample
      correction `gamma(m / 2) / (sqrt(m / 2) * gamma((m - 1) / 2))`, m = n - 1 (Hedges 1981; Lakens 2013);
    - `p`: of the two-sided paired t test; `p_holm` (Holm 1979) is corrected over all pairs of the condition;
    - `p_permutation`: of the exact test that flips the differences' signs, uncorrected; None above 10 seeds;
    - `told_apart`: `p_holm` is at most 0.05;
    - `more_seeds`: how many further seeds give a power of 0.8 if the true effect is the one seen, at the level
      that Holm asks of the next pair (0.05 / number of pairs not told apart); None where they are told apart, below
      3 seeds, and above 1000;
    - `leading`: one of the two is the best of its condition.

    Numbers that n does not allow are NaN. Where all differences are the same there is no spread to test by: `p` is
    then the sign flips', and the effect NaN.
    """

    condition: str
    better: str
    worse: str
    n: int
    difference: float
    low: float
    high: float
    effect: float
    p: float
    p_holm: float
    told_apart: bool
    more_seeds: int | None
    text: str
    p_permutation: float | None = None
    leading: bool = False


def find_pairs(meeting: Meeting) -> list[Pair]:
    """All pairs of the contenders under one condition, those of the best one first, corrected together."""
    gains, cells = meeting.gains.to_numpy(), meeting.cells
    seeds = pd.factorize(meeting.gains.index.get_level_values("seed"))[0]
    pairs = []
    for first, second in combinations(range(len(cells)), 2):
        differences = _mean_by(seeds, gains[:, first] - gains[:, second])
        better, worse = cells[first].contender, cells[second].contender
        if len(differences) and differences.mean() < 0:
            better, worse, differences = worse, better, -differences
        pairs.append(replace(paired(meeting.condition, better, worse, differences), leading=first == 0))
    lost = {cell.contender: text for cell in cells if (text := _lost(cell))}
    return [replace(pair, text=_text(pair, lost)) for pair in corrected(pairs)]


def _mean_by(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean of each group's values, of those that are not NaN; a group with none is left out."""
    known = ~np.isnan(values)
    count = np.bincount(groups[known])
    total = np.bincount(groups[known], values[known])
    return np.asarray(total[count > 0] / count[count > 0])


def paired(condition: str, better: str, worse: str, differences: np.ndarray) -> Pair:
    """The pair's own numbers, before any correction."""
    from scipy.stats import ttest_1samp

    n = len(differences)
    mean = float(differences.mean()) if n else math.nan
    low = high = effect = p = math.nan
    permuted = _sign_flips(differences) if 2 <= n <= EXACT else None
    if n > 1 and _same(differences):
        low = high = mean
        p = permuted if permuted is not None else 2.0 ** (1 - n) if mean else 1.0
    elif n > 1:
        test = ttest_1samp(differences, 0.0)
        low, high = map(float, test.confidence_interval(0.95))
        p = float(test.pvalue)
        effect = _hedges(n) * mean / float(differences.std(ddof=1)) if n > 2 else math.nan
    return Pair(condition, better, worse, n, mean, low, high, effect, p, p, False, None, "", permuted)


def _same(differences: np.ndarray) -> bool:
    """Whether all differences are one number, up to the rounding of the subtraction."""
    return bool(np.ptp(differences) <= 1e-12 * max(1.0, float(np.abs(differences).max())))


def _hedges(n: int) -> float:
    m = n - 1
    return math.exp(math.lgamma(m / 2) - math.lgamma((m - 1) / 2)) / math.sqrt(m / 2)


def _sign_flips(differences: np.ndarray) -> float:
    from scipy.stats import permutation_test

    pair = (differences, np.zeros_like(differences))
    test = permutation_test(
        pair,
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=2**EXACT,
        vectorized=True,
    )
    return float(test.pvalue)


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's p of one family: the i-th smallest of m, from 0, times m - i, never falling and at most 1; NaN is no test.

    The same as statsmodels' `multipletests(p, method="holm")`, which collects garbage in every call: 0.1 s in a
    process with a comparison in it.
    """
    values = np.asarray(p, dtype=float)
    order = np.argsort(values)[: int(np.isfinite(values).sum())]  # NaN sorts last
    result = np.full_like(values, np.nan)
    result[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)))
    return result


def corrected(pairs: list[Pair]) -> list[Pair]:
    """The pairs of one family with `p_holm`, whether it tells them apart, and else how many more seeds would."""
    adjusted = holm([pair.p for pair in pairs])
    pairs = [
        replace(pair, p_holm=p, told_apart=p <= ALPHA)
        for pair, p in zip(pairs, adjusted.tolist(), strict=True)
    ]
    level = ALPHA / max(1, int((adjusted > ALPHA).sum()))
    more = more_seeds([pair.effect for pair in pairs], [pair.n for pair in pairs], level)
    return [
        pair if pair.told_apart else replace(pair, more_seeds=seeds)
        for pair, seeds in zip(pairs, more, strict=True)
    ]


def more_seeds(effects: Sequence[float], seeds: Sequence[int], alpha: float = ALPHA) -> list[int | None]:
    """Of each effect, seen with so many seeds, how many more find it with a power of 0.8 at level `alpha`.

    That is the power of a two-sided paired t test if the effect is true. None where the effect is unknown or takes
    more than 1000.
    """
    from statsmodels.stats.power import TTestPower

    effect, n = np.abs(np.asarray(effects, dtype=float)), np.asarray(seeds, dtype=int)

    def enough(more: np.ndarray) -> np.ndarray:
        # Not `>=`: the power of a huge effect overflows to NaN.
        return np.asarray(~(TTestPower().power(effect, n + more, alpha) < POWER))

    low, high = np.ones_like(n), np.full_like(n, MOST)
    known = np.isfinite(effect) & enough(high)
    while (low < high).any():
        middle = (low + high) // 2
        reached = enough(middle)
        low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
    return [int(more) if found else None for more, found in zip(low, known, strict=True)]


def _lost(cell: Cell) -> str:
    states = {state: cell.states[state] for state in ("diverged", "failed") if state in cell.states}
    if not states:
        return ""
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    total = int((cell.runs["state"] != "duplicate").sum())
    return f"{cell.contender} lost {sum(states.values())} of {total} runs ({counts})"


def _text(pair: Pair, lost: dict[str, str]) -> str:
    where = f"At {pair.condition}: " if pair.condition else ""
    losses = "; ".join(lost[name] for name in (pair.better, pair.worse) if name in lost)
    return f"{where}{_sentence(pair)}.{f' {losses}: no number here shows that.' if losses else ''}"


def _sentence(pair: Pair) -> str:
    """What these seeds say of the two."""
    both = f"{pair.better} and {pair.worse}"
    if pair.n == 0:
        return f"{both} have no finished seed in common, so they cannot be paired"
    if pair.n == 1:
        ahead = f"{pair.better} better by {number(pair.difference)}" if pair.difference else "equal there"
        return f"{both} have one seed in common ({ahead}), which says nothing of the spread"
    if pair.low == pair.high == 0:
        return f"{both} are exactly equal on all {pair.n} common seeds"
    shown = numbers(pair, max(abs(pair.low), abs(pair.high)))
    if pair.told_apart:
        return f"With {pair.n} common seeds, {pair.better} is better than {pair.worse} ({shown})"
    return f"With {pair.n} common seeds, {both} cannot be told apart ({shown}): {_needs(pair)}"


def _needs(pair: Pair) -> str:
    if pair.more_seeds is not None:
        plural = "s" if pair.more_seeds > 1 else ""
        return f"if the true difference is this one, it needs about {pair.more_seeds} more seed{plural}"
    if not math.isfinite(pair.effect):
        return f"{pair.n} seeds are too few to say how many more it needs"
    return f"so small a difference needs over {MOST} more seeds"


def p_number(p: float) -> str:
    """`0.004`; `-` where nothing was tested."""
    if not math.isfinite(p):
        return "-"
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def p_value(p: float) -> str:
    """`p = 0.004`."""
    return f"p {'' if p < 0.0001 else '= '}{p_number(p)}"


def numbers(pair: Pair, size: float) -> str:
    """`difference 0.0102, 95 % interval -0.0159 to 0.0363, p = 1 after Holm`, in the digits of a number like `size`."""
    digits = decimals(size)
    interval = f"95 % interval {pair.low:.{digits}f} to {pair.high:.{digits}f}"
    spread = "the same on every seed" if pair.low == pair.high else interval
    return f"difference {pair.difference:.{digits}f}, {spread}, {p_value(pair.p_holm)} after Holm"
