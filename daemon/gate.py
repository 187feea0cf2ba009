"""The verdict on a candidate: wins and losses where it differs from the champion, gold, and the limits that shown harm breaks."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from daemon import significance
from storage.sampling import slice_key

Rule = Literal["posterior", "anytime"]
Outcome = Literal["promote", "reject", "inconclusive"]

FAR = 1000
"""A verdict that is further away than so many more answers is reported as out of reach."""


@dataclass(frozen=True, slots=True)
class ExamPolicy:
    """How sure is sure, and how much harm is too much. Limits are shares of 1; `denied` is None where nothing can be denied."""

    rule: Rule = "posterior"
    prior: float = 6
    confidence: float = 0.9
    last_confidence: float = 0.8
    alpha: float = 0.1
    max_asked: int = 60
    gold_limit: float = 0.03
    slice_limit: float = 0.05
    slice_min: int = 30
    limit_confidence: float = 0.95
    denied: str | None = "DENIED"
    approved: str | None = "APPROVED"


@dataclass(frozen=True, slots=True)
class Pair:
    """Both models' answers to one claim and the expert's; `slices` are attribute values by name, `distance` see `exam_sample`."""

    candidate: str
    champion: str
    truth: str
    slices: Mapping[str, str] = field(default_factory=dict)
    distance: float = 1.0

    @property
    def is_win(self) -> bool:
        """Only the candidate is right."""
        return self.candidate == self.truth != self.champion

    @property
    def is_loss(self) -> bool:
        """Only the champion is right."""
        return self.champion == self.truth != self.candidate


@dataclass(frozen=True, slots=True)
class ExamEvidence:
    """All that a verdict rests on.

    `pairs`: answered claims where the two differ, the exam's and those audited after the candidate's cut. `pool` claims were scored by
    both and `differing` of them answered differently; `asked` reviews were opened, `waiting` of them have no answer yet. `gold`: the gold
    rows that both answered. `is_degenerate` says what is wrong with scores that are no scores. `compared_with_base`: this is a first
    version, its champion is the bare base, and there was nobody to ask. `is_last`: the next candidate is there, so this is the last look.
    """

    pairs: tuple[Pair, ...] = ()
    pool: int = 0
    differing: int = 0
    asked: int = 0
    waiting: int = 0
    gold: tuple[Pair, ...] = ()
    is_degenerate: str | None = None
    compared_with_base: bool = False
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do, why in sentences, and every number behind it (ready for JSON)."""

    outcome: Outcome
    reasons: tuple[str, ...]
    numbers: Mapping[str, Any]


class Tally(NamedTuple):
    """Answers on differing claims, by what they say of the candidate."""

    wins: int
    losses: int
    neither: int

    @property
    def answered(self) -> int:
        """All of them."""
        return self.wins + self.losses + self.neither


class Limit(NamedTuple):
    """A hard limit. `p` is the chance of such evidence if the harm were within `allowed` (Holm-adjusted for slices)."""

    name: str
    harm: float
    allowed: float
    labels: int
    p: float
    needed: float

    @property
    def is_broken(self) -> bool:
        """Whether more harm than allowed is shown."""
        return self.p <= self.needed

    def describe(self) -> dict[str, Any]:
        """The limit as the report shows it; `nearness` is 0 when nothing speaks for harm and 1 when the limit breaks."""
        nearness = min(1.0, math.log(max(self.p, 1e-300)) / math.log(self.needed))
        return {**self._asdict(), "nearness": abs(nearness), "is_broken": self.is_broken}


def decide(evidence: ExamEvidence, policy: ExamPolicy) -> Verdict:
    """Judge a candidate: hard limits first; a first version passes unless gold shows harm; else the policy's rule on wins and losses."""
    counts = tally(evidence.pairs)
    limits = weigh_limits(evidence, policy)
    numbers = {**report_exam(evidence, policy), **report_gold(evidence.gold), "limits": [limit.describe() for limit in limits]}
    broken = [_explain_limit(limit) for limit in limits if limit.is_broken]
    if evidence.is_degenerate:
        broken.insert(0, f"The candidate's scores are degenerate: {evidence.is_degenerate}.")
    if broken:
        return Verdict("reject", tuple(broken), numbers)
    if evidence.compared_with_base:
        return Verdict("promote", (_explain_first(evidence.gold),), numbers)
    outcome = apply_rule(policy.rule, counts.wins, counts.losses, policy, is_last=evidence.is_last)
    return Verdict(outcome, (_explain_rule(outcome, counts, evidence, policy),), numbers)


def tally(pairs: Sequence[Pair]) -> Tally:
    """Count wins, losses and answers that both got wrong; claims on which the two agree say nothing and are left out."""
    wins, losses = sum(pair.is_win for pair in pairs), sum(pair.is_loss for pair in pairs)
    return Tally(wins, losses, sum(pair.candidate != pair.champion for pair in pairs) - wins - losses)


def apply_rule(rule: Rule, wins: int, losses: int, policy: ExamPolicy, *, is_last: bool = False) -> Outcome:
    """What wins and losses alone say under a rule; rejection is the mirror image of promotion.

    Many looks need more certainty at each than a last one, after which nobody looks again: only `posterior` knows the difference.
    """
    if _is_better(rule, wins, losses, policy, policy.last_confidence if is_last else policy.confidence):
        return "promote"
    return "reject" if _is_better(rule, losses, wins, policy, policy.confidence) else "inconclusive"


def _is_better(rule: Rule, wins: int, losses: int, policy: ExamPolicy, confidence: float) -> bool:
    if rule == "posterior":
        return significance.posterior_better(wins, losses, policy.prior) >= confidence
    return significance.mixture_evalue(wins, losses) >= 1 / policy.alpha


def weigh_limits(evidence: ExamEvidence, policy: ExamPolicy) -> list[Limit]:
    """All hard limits on which there is evidence. Against the bare base only gold accuracy counts: a base may deny nothing at all."""
    needed = round(1 - policy.limit_confidence, 9)
    if evidence.compared_with_base:
        return [_weigh_drop("gold accuracy", evidence.gold, 0.0, needed)] if evidence.gold else []
    limits = []
    if policy.denied is not None:
        limits = [
            _weigh_denials(name, pairs, policy, needed) for name, pairs in (("exam", evidence.pairs), ("gold", evidence.gold)) if pairs
        ]
    if evidence.gold:
        limits.append(_weigh_drop("gold accuracy", evidence.gold, policy.gold_limit, needed))
    return limits + _weigh_slices(evidence.gold, policy, needed)


def _weigh_denials(name: str, pairs: Sequence[Pair], policy: ExamPolicy, needed: float) -> Limit:
    """Whether the candidate makes more wrongful denials of its own than it removes of the champion's."""
    owed = [pair for pair in pairs if pair.truth == policy.approved]
    new = sum(pair.is_loss and pair.candidate == policy.denied for pair in owed)
    removed = sum(pair.is_win and pair.champion == policy.denied for pair in owed)
    return Limit(f"wrongful denials on {name}", new - removed, 0, len(owed), significance.sign_test(new, removed), needed)


def _weigh_drop(name: str, pairs: Sequence[Pair], allowed: float, needed: float) -> Limit:
    """Whether the share of right answers fell by more than allowed."""
    counts = tally(pairs)
    p = significance.drop_test(counts.losses, counts.wins, len(pairs), allowed)
    return Limit(name, (counts.losses - counts.wins) / len(pairs), allowed, len(pairs), p, needed)


def _weigh_slices(gold: Sequence[Pair], policy: ExamPolicy, needed: float) -> list[Limit]:
    """One limit for each slice of gold with enough labels, with Holm's correction for their number."""
    slices = {name: pairs for name, pairs in slice_pairs(gold).items() if len(pairs) >= policy.slice_min}
    limits = {name: _weigh_drop(f"slice {name}", pairs, policy.slice_limit, needed) for name, pairs in slices.items()}
    adjusted = significance.adjust_holm({name: limit.p for name, limit in limits.items()})
    return [limit._replace(p=adjusted[name]) for name, limit in limits.items()]


def slice_pairs(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Pairs by `name=value` of each of their slices."""
    slices: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        for name, value in pair.slices.items():
            slices[slice_key(name, value)].append(pair)
    return dict(sorted(slices.items()))


def report_exam(evidence: ExamEvidence, policy: ExamPolicy) -> dict[str, Any]:
    """Every number of the exam: counts, what both rules make of them, the gain in points and how far a verdict is."""
    counts = tally(evidence.pairs)
    wins, losses = counts.wins, counts.losses
    gain, low, high = significance.gain_interval(*weigh_answers(evidence.pairs), evidence.differing, evidence.pool)
    other: Rule = "anytime" if policy.rule == "posterior" else "posterior"
    return {
        "rule": policy.rule,
        "pool": evidence.pool,
        "differing": evidence.differing,
        "share_differing": evidence.differing / evidence.pool if evidence.pool else 0.0,
        "asked": evidence.asked,
        "waiting": evidence.waiting,
        "answered": counts.answered,
        "wins": wins,
        "losses": losses,
        "neither": counts.neither,
        "posterior": significance.posterior_better(wins, losses, policy.prior),
        "evalue": significance.mixture_evalue(wins, losses),
        "evalue_worse": significance.mixture_evalue(losses, wins),
        "gain_points": 100 * gain,
        "gain_points_interval": [100 * low, 100 * high],
        "other_rule": {"rule": other, "outcome": apply_rule(other, wins, losses, policy)},
        "more_answers": report_distance(wins, losses, policy),
        "slices": _tabulate_slices(evidence.pairs),
    }


def report_distance(wins: int, losses: int, policy: ExamPolicy) -> dict[str, int | None]:
    """How many more decided answers bring a verdict: all wins, all losses, or wins at the rate seen so far (None: out of reach)."""
    rate = wins / (wins + losses) if wins + losses else 0.5

    def at_rate(more: int) -> Outcome:
        new_wins = round(more * rate)
        return apply_rule(policy.rule, wins + new_wins, losses + more - new_wins, policy)

    return {
        "wins_to_promote": _count_until(lambda more: apply_rule(policy.rule, wins + more, losses, policy) == "promote"),
        "losses_to_reject": _count_until(lambda more: apply_rule(policy.rule, wins, losses + more, policy) == "reject"),
        "at_this_rate": None if wins == losses else _count_until(lambda more: at_rate(more) != "inconclusive"),
    }


def _count_until(holds: Callable[[int], bool]) -> int | None:
    """The smallest number of more answers for which it holds, None when that is out of reach."""
    return next((more for more in range(FAR + 1) if holds(more)), None)


def report_gold(gold: Sequence[Pair]) -> dict[str, Any]:
    """Gold before (champion) and after (candidate): accuracy, flips, confusion matrices and slices. Empty gold is reported as None.

    A negative flip is a row that the champion got right and the candidate gets wrong: what it has forgotten.
    """
    if not gold:
        return {"gold": None}
    return {
        "gold": {
            "rows": len(gold),
            "accuracy_before": sum(pair.champion == pair.truth for pair in gold) / len(gold),
            "accuracy_after": sum(pair.candidate == pair.truth for pair in gold) / len(gold),
            "negative_flips": sum(pair.is_loss for pair in gold),
            "positive_flips": sum(pair.is_win for pair in gold),
            "confusion_before": _tabulate_confusion([(pair.truth, pair.champion) for pair in gold]),
            "confusion_after": _tabulate_confusion([(pair.truth, pair.candidate) for pair in gold]),
            "slices": _tabulate_slices(gold),
        }
    }


def _tabulate_confusion(answers: Sequence[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Counts by truth, then by answer."""
    counts = Counter(answers)
    labels = sorted({label for answer in answers for label in answer})
    return {truth: {answer: counts[truth, answer] for answer in labels} for truth in labels}


def _tabulate_slices(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """One row per slice: labels, accuracies, wins and losses."""
    return [
        {
            "slice": name,
            "labels": len(group),
            "accuracy_before": sum(pair.champion == pair.truth for pair in group) / len(group),
            "accuracy_after": sum(pair.candidate == pair.truth for pair in group) / len(group),
            "wins": sum(pair.is_win for pair in group),
            "losses": sum(pair.is_loss for pair in group),
        }
        for name, group in slice_pairs(pairs).items()
    ]


def _explain_limit(limit: Limit) -> str:
    if limit.name.startswith("wrongful denials"):
        excess = f"{limit.harm:.0f} more than it removes among {limit.labels} claims owed approval"
        return f"Hard limit broken, {limit.name}: {excess} (p = {limit.p:.3f})."
    fall = f"fell by {100 * limit.harm:.1f} points on {limit.labels} labels"
    return f"Hard limit broken, {limit.name}: {fall}, shown to be more than {100 * limit.allowed:.0f} (p = {limit.p:.3f})."


def _explain_first(gold: Sequence[Pair]) -> str:
    if not gold:
        return "First version: there is nobody to ask and no gold, so nothing speaks against it."
    counts = tally(gold)
    return f"First version: gold shows no harm against the bare base ({counts.wins} rows better, {counts.losses} worse, of {len(gold)})."


def _explain_rule(outcome: Outcome, counts: Tally, evidence: ExamEvidence, policy: ExamPolicy) -> str:
    """The rule's sentence, with the one number that decided and what it was held against."""
    where = (
        f"Where the two differ ({evidence.differing} of {evidence.pool} claims) the candidate won {counts.wins} and lost {counts.losses}"
    )
    if policy.rule == "posterior":
        measured = f"P(candidate better) is {significance.posterior_better(counts.wins, counts.losses, policy.prior):.3f}"
        needed = f"{policy.last_confidence:g} at this last look" if evidence.is_last else f"{policy.confidence:g}"
        bounds = f"promote from {needed}, reject to {1 - policy.confidence:.3g}"
    else:
        evalues = significance.mixture_evalue(counts.wins, counts.losses), significance.mixture_evalue(counts.losses, counts.wins)
        measured = f"the e-values for better and worse are {evalues[0]:.1f} and {evalues[1]:.1f}"
        bounds = f"a verdict from {1 / policy.alpha:g}"
    ending = {"promote": "promoted", "reject": "rejected", "inconclusive": "no verdict yet"}[outcome]
    return f"{where}, {counts.neither} neither: {measured} ({bounds}): {ending}."


def weigh_answers(pairs: Sequence[Pair]) -> tuple[float, float, float]:
    """Wins, losses and all answers on differing claims, as an even sample would have them: what was preferred weighs less.

    Each answer weighs the inverse of its distance; together they count for as many as tell the same (Kish's effective sample size).
    """
    weights = [(pair, 1 / pair.distance) for pair in pairs if pair.candidate != pair.champion]
    total, squares = sum(weight for _, weight in weights), sum(weight**2 for _, weight in weights)
    scale = total / squares if weights else 0.0
    wins = sum(weight for pair, weight in weights if pair.is_win)
    losses = sum(weight for pair, weight in weights if pair.is_loss)
    return wins * scale, losses * scale, total * scale
