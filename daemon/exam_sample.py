"""Which of the claims that two models answer differently an exam asks about: at random, most where the two are far apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from storage.sampling import bucket

LEAST_DISTANCE = 0.01
"""No two models that differ on a claim count as closer than this, so that no answer weighs without bound."""


def measure_distance(candidate: Sequence[float], champion: Sequence[float]) -> float:
    """Total variation between two models' probabilities for one claim, in (0, 1]; models with other label sets are 1 apart."""
    if len(candidate) != len(champion):
        return 1.0
    return max(LEAST_DISTANCE, sum(abs(ours - theirs) for ours, theirs in zip(candidate, champion, strict=True)) / 2)


def choose_items(differing: Mapping[str, float], agent: str, exam_id: str, count: int) -> list[str]:
    """A random sample of the differing claims not asked yet, those in preference on which the models are far apart.

    `differing` are distances by claim: of two claims the one with twice the distance is drawn first twice as often. The sample is the same
    whenever it is drawn again; each exam salts its hash anew, so that being asked in one says nothing about the next.
    """
    return sorted(differing, key=lambda claim: _rank(claim, differing[claim], agent, exam_id))[: max(0, count)]


def count_in(answered: Mapping[str, float], asked: Mapping[str, float], agent: str, exam_id: str) -> list[str]:
    """Of the answered claims those that the exam's random order has reached: what it asked about, and what had an answer by then.

    Both are distances by claim. An answer that the router asked for is as good as one that the exam asked for, but routers prefer
    uncertain claims. Counted only where the exam would have asked as well, they are no larger a part of the evidence than of its sample.
    """
    reached = max((_rank(claim, distance, agent, exam_id) for claim, distance in asked.items()), default=-1.0)
    return [claim for claim, distance in answered.items() if _rank(claim, distance, agent, exam_id) <= reached]


def _rank(claim: str, distance: float, agent: str, exam_id: str) -> float:
    """Exponential with the distance as its rate: the order of weighted sampling without replacement (Efraimidis and Spirakis 2006)."""
    return -math.log1p(-bucket("exam", agent, f"{exam_id}\0{claim}")) / distance
