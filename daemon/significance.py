"""How sure counts make us: the few tests that exam, watch and drift share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import scipy  # its parts load when they are first used: they are half of what a daemon imports, and the first verdict may be weeks away

Name = TypeVar("Name")


def posterior_better(wins: int, losses: int, prior: float) -> float:
    """P(right in more than half of the decided cases), from Beta(prior + wins, prior + losses)."""
    return float(scipy.special.betaincc(prior + wins, prior + losses, 0.5))


def mixture_evalue(wins: int, losses: int) -> float:
    """Evidence against `right in half of the decided cases or fewer`; at any of many looks it exceeds 1/a with chance a at most (Ville).

    The likelihood ratio to a fair coin averaged over shares from Beta(2, 2) above 1/2, most of which are 0.5 to 0.8, as useful
    candidates have them: 2^(n+1) B(w+2, l+2) / B(2, 2) P(Beta(w+2, l+2) > 1/2).
    """
    tail = float(scipy.special.betaincc(wins + 2, losses + 2, 0.5))
    if not tail:  # so many losses that the number underflows
        return 0.0
    ratio = float(scipy.special.betaln(wins + 2, losses + 2) - scipy.special.betaln(2, 2))
    return math.exp(min((wins + losses + 1) * math.log(2) + ratio + math.log(tail), 690.0))


def sign_test(more: int, fewer: int) -> float:
    """The exact one-sided chance of `more` or more heads in more + fewer tosses of a fair coin."""
    return float(scipy.special.bdtrc(more - 1, more + fewer, 0.5)) if more else 1.0


def drop_test(losses: int, wins: int, pairs: int, allowed: float) -> float:
    """One-sided p-value against `the share of right answers fell by at most allowed`, for paired answers.

    Tango's score test (Statistics in Medicine 17, 1998), and never below the exact sign test, for few discordant pairs.
    """
    if not pairs or losses - wins <= allowed * pairs:
        return 1.0
    linear = -losses - wins + (2 * pairs - losses + wins) * allowed
    constant = -wins * allowed * (1 - allowed)
    restricted = (math.sqrt(linear * linear - 8 * pairs * constant) - linear) / (4 * pairs)
    variance = pairs * (2 * restricted + allowed * (1 - allowed))
    score = (losses - wins - pairs * allowed) / math.sqrt(variance) if variance > 0 else math.inf
    return max(float(scipy.special.ndtr(-score)), sign_test(losses, wins))


def fall_test(before: tuple[int, int], now: tuple[int, int]) -> float:
    """Fisher's exact one-sided p-value against `the share of right answers did not fall`; arguments are (right, total)."""
    (right_before, total_before), (right_now, total_now) = before, now
    return float(scipy.stats.hypergeom.cdf(right_now, total_before + total_now, right_before + right_now, total_now))


def adjust_holm(raw: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's adjusted p-values: comparing them with a level keeps the chance of any false finding below that level."""
    adjusted, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(raw.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, p * (len(raw) - rank)))
        adjusted[name] = highest
    return adjusted


def gain_interval(
    wins: float, losses: float, answered: float, differing: int, pool: int, *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """The gain in accuracy on the pool, as a share, with its interval: (share differing) x (wins - losses) / answered.

    Half an answer is added to each of the four outcomes before the variance is taken (Agresti and Min, 2005), so that few answers do not
    look sure; the share differing brings its own variance.
    """
    if not differing:
        return 0.0, 0.0, 0.0
    share = differing / pool
    net = (wins - losses) / answered if answered else 0.0
    smoothed, total = (wins - losses) / (answered + 2), answered + 2
    variance = ((wins + losses + 1) / total - smoothed**2) / total
    spread = -float(scipy.special.ndtri((1 - confidence) / 2)) * math.sqrt(share**2 * variance + smoothed**2 * share * (1 - share) / pool)
    centre = share * smoothed
    return share * net, max(-share, centre - spread), min(share, centre + spread)
