"""Which rule should promote? Replays real decisions through our router and `decide`, with a logistic regression as the model.

Three streams, each honest, spoiled (half of the training answers inverted) and null (nobody can beat the first model); the rules never,
always, posterior and anytime; and the exact chance of a verdict within 60 answers. Needs RATCHET_TEST_DATA; `make bench NAME=exam`.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import OneHotEncoder

from consumers import budget, routing, rules
from daemon import exam_sample, gate
from storage.sampling import bucket
from trainers.spec import Options

STREAMS = ((2005, 2010), (2007, 2011), (2010, 2013))
KINDS, RULES = ("honest", "spoiled", "null"), ("never", "always", "posterior", "anytime")
JUDGED: tuple[gate.Rule, ...] = ("posterior", "anytime")
LABELS = ("DENIED", "APPROVED")
FIELDS = ("diagnosis_category", "diagnosis_subcategory", "treatment_category", "treatment_subcategory", "type", "age_range", "gender")
WINDOW, RECENT, RETRAIN_LABELS, GOLD_SHARE = 250, 500, 75, 0.05
PRIOR_VARIANCE = 0.6
TRAINING = Options()
BUDGET = rules.RoutingPolicy(budget_share=0.1)
PUBLISHED = {  # the table by which the design was chosen: honest, share of the gain, spoiled, null, promotions on null
    "never": (0.587, 0.0, 0.587, 0.663, 0.0),
    "always": (0.610, 1.0, 0.581, 0.650, 22.0),
    "posterior": (0.603, 0.71, 0.591, 0.662, 0.5),
    "anytime": (0.595, 0.37, 0.589, 0.663, 0.1),
}


@dataclass(frozen=True)
class Cases:
    """History and then a stream, in the order of the decisions; columns one-hot, answers 1 for APPROVED, times in days."""

    keys: list[str]
    columns: sparse.csr_matrix
    answers: np.ndarray
    times: np.ndarray
    history: int
    types: list[str]


@dataclass(frozen=True)
class Outcome:
    """What one rule made of one stream."""

    accuracy: float
    promotions: int = 0
    rejections: int = 0
    candidates: int = 0
    label_share: float = 0.0


@dataclass
class Candidate:
    """A model that waits for its verdict, what was asked about it, and what the router sent to experts meanwhile."""

    model: LogisticRegression
    name: str
    claims: list[int]
    asked: list[int] = field(default_factory=list)
    audited: list[int] = field(default_factory=list)
    routed: list[int] = field(default_factory=list)


def read_rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return sorted(csv.DictReader(lines), key=lambda row: (row["report_year"], int(re.findall(r"\d+", row["reference_id"])[-1])))


def take_stream(rows: list[dict[str, str]], cut: int, last: int) -> Cases:
    chosen = [row for row in rows if int(row["report_year"]) <= last]
    columns = sparse.csr_matrix(OneHotEncoder().fit_transform([[row[name] for name in FIELDS] for row in chosen]))
    answers = np.array([row["determination"].startswith("Overturned") for row in chosen], dtype=int)
    keys = [f"{row['report_year']}/{row['reference_id']}" for row in chosen]
    times = date_rows(chosen)
    return Cases(keys, columns, answers, times, sum(int(row["report_year"]) <= cut for row in chosen), [row["type"] for row in chosen])


def date_rows(rows: list[dict[str, str]]) -> np.ndarray:
    """When each was decided, in days: the record knows the year and the order, so each year's are spread evenly over it."""
    years = [int(row["report_year"]) for row in rows]
    of_year, seen = Counter(years), Counter[int]()
    times = []
    for year in years:
        times.append(365.25 * (year + seen[year] / of_year[year]))
        seen[year] += 1
    return np.array(times)


class Replay:
    """One stream under one rule and seed: the loop of the daemon, with a model that trains in milliseconds."""

    def __init__(self, cases: Cases, kind: str, rule: str, seed: int, policy: gate.ExamPolicy) -> None:
        self.cases, self.kind, self.rule, self.policy = cases, kind, rule, policy
        self.agent = f"seed-{seed}"
        self.is_gold = np.array([bucket("split", self.agent, key) < GOLD_SHARE for key in cases.keys])
        self.lessons = [case for case in range(cases.history) if not self.is_gold[case]]
        self.gold = [case for case in range(cases.history) if self.is_gold[case]]
        self.truth = cases.answers.copy()
        self.taught = cases.answers.copy()
        self.champion = self.train(is_first=True)
        draw = np.random.default_rng(seed)
        if kind == "null":
            chance = self.champion.predict_proba(cases.columns[cases.history :])[:, 1]
            self.truth[cases.history :] = draw.random(len(chance)) < chance
        self.taught = self.truth.copy()
        if kind == "spoiled":
            flipped = draw.random(len(cases.keys) - cases.history) < 0.5
            self.taught[cases.history :] ^= flipped
        self.window = budget.Window(BUDGET.window)
        self.answered: set[int] = set()
        self.fresh = 0
        self.candidate: Candidate | None = None
        self.opened: list[int] = []
        self.verdicts: Counter[str] = Counter()

    def train(self, *, is_first: bool = False) -> LogisticRegression:
        """Fit on all lessons: those that were not imported weigh more, and all but the first model replay history as the trainer does."""
        lessons, history = np.array(self.lessons), self.cases.history
        ages = np.maximum(0.0, self.cases.times[history - 1] - self.cases.times[lessons])
        half_life = TRAINING.replay_half_life_days
        halvings = ages / half_life if half_life and not is_first else 0 * ages
        weights = np.where(lessons < history, 0.5**halvings, TRAINING.new_weight)
        return LogisticRegression(C=PRIOR_VARIANCE, max_iter=300).fit(
            self.cases.columns[lessons], self.taught[lessons], sample_weight=weights
        )

    def run(self) -> Outcome:
        right = 0
        for start in range(self.cases.history, len(self.cases.keys), WINDOW):
            claims = range(start, min(start + WINDOW, len(self.cases.keys)))
            right += self.serve(claims)
            if self.rule != "never" and self.fresh >= RETRAIN_LABELS:
                self.start_candidate(claims.stop)
            if self.candidate is not None:
                self.examine(self.candidate, claims.stop)
        stream = len(self.cases.keys) - self.cases.history
        share = len(self.answered) / stream
        return Outcome(right / stream, self.verdicts["promote"], self.verdicts["reject"], self.verdicts["candidates"], share)

    def serve(self, claims: range) -> int:
        """Predict, route and answer one window; how many predictions were right."""
        chances = self.champion.predict_proba(self.cases.columns[claims.start : claims.stop])
        decisions, confidences = chances.argmax(axis=1), chances.max(axis=1)
        if self.rule != "never":
            spent = self.read_spent(claims.start)
            for case, decision, confidence in zip(claims, decisions, confidences, strict=True):
                self.route(case, LABELS[decision], float(confidence), spent)
        return int((decisions == self.truth[claims.start : claims.stop]).sum())

    def route(self, case: int, decision: str, confidence: float, spent: budget.Spent) -> None:
        prediction = rules.Prediction(self.agent, self.cases.keys[case], decision, confidence)
        routed = routing.route(prediction, BUDGET, self.window.state(spent))
        routing.add_routed(self.window, prediction, routed, BUDGET, {})
        if self.candidate is not None:
            self.candidate.claims.append(case)
            if routing.AUDIT in routed.reasons:
                self.candidate.audited.append(case)
            elif routed.is_routed:
                self.candidate.routed.append(case)
        if routed.is_routed:
            self.answer(case)

    def answer(self, case: int) -> None:
        """An expert answers: a lesson, or a gold row that is never trained on."""
        self.answered.add(case)
        (self.gold if self.is_gold[case] else self.lessons).append(case)
        self.fresh += 1

    def start_candidate(self, now: int) -> None:
        """Train on everything known; the candidate supersedes the one that waits, after a last look at that."""
        if self.candidate is not None:
            self.judge(self.candidate, is_last=True)
        self.fresh -= RETRAIN_LABELS
        self.verdicts["candidates"] += 1
        recent = [case for case in range(max(self.cases.history, now - RECENT), now) if case not in self.answered]
        self.candidate = Candidate(self.train(), f"exam-{self.verdicts['candidates']}", recent)
        if self.rule == "always":
            self.conclude(self.candidate, "promote")

    def read_spent(self, now: int) -> budget.Spent:
        """Exam reviews opened in the last window of claims: the uncertain claims of the next one give way to as many."""
        return budget.Spent(examined=sum(at > now - WINDOW for at in self.opened))

    def find_pool(self, candidate: Candidate) -> dict[int, float]:
        """The scored claims on which the two differ and nobody has answered yet, and how far apart they are."""
        return {case: far for case, far in self.differing(candidate, candidate.claims).items() if case not in self.answered}

    def differing(self, candidate: Candidate, claims: list[int]) -> dict[int, float]:
        if not claims:
            return {}
        columns = self.cases.columns[claims]
        new, old = (model.predict_proba(columns) for model in (candidate.model, self.champion))
        places = np.flatnonzero(new.argmax(axis=1) != old.argmax(axis=1))
        return {claims[place]: exam_sample.measure_distance(new[place], old[place]) for place in places}

    def name(self, cases: dict[int, float]) -> dict[str, float]:
        return {self.cases.keys[case]: far for case, far in cases.items()}

    def examine(self, candidate: Candidate, now: int) -> None:
        """Ask about some of the claims on which the two differ, then judge."""
        pool = self.find_pool(candidate)
        cases = {self.cases.keys[case]: case for case in pool}
        places = budget.count_places(BUDGET, self.window.state(self.read_spent(now))).exam
        allowed = min(places, self.policy.max_asked - len(candidate.asked))
        for key in exam_sample.choose_items(self.name(pool), self.agent, candidate.name, round(allowed)):
            candidate.asked.append(cases[key])
            self.opened.append(now)
            self.answer(cases[key])
        self.judge(candidate)

    def judge(self, candidate: Candidate, *, is_last: bool = False) -> None:
        """Decide, and act on it."""
        verdict = gate.decide(replace(self.gather(candidate), is_last=is_last), self.policy)
        if verdict.outcome != "inconclusive":
            self.conclude(candidate, verdict.outcome)

    def gather(self, candidate: Candidate) -> gate.ExamEvidence:
        differing = self.differing(candidate, candidate.claims)
        audited, routed, asked = (
            {case: differing[case] for case in claims if case in differing}
            for claims in (candidate.audited, candidate.routed, candidate.asked)
        )
        reached = set(exam_sample.count_in(self.name(routed), self.name(asked), self.agent, candidate.name))
        judged = sorted({*asked, *audited, *(case for case in routed if self.cases.keys[case] in reached)})
        return gate.ExamEvidence(
            pairs=self.pair(candidate, judged),
            pool=len(candidate.claims),
            differing=len(differing),
            asked=len(candidate.asked),
            gold=self.pair(candidate, self.gold),
        )

    def pair(self, candidate: Candidate, claims: list[int]) -> tuple[gate.Pair, ...]:
        if not claims:
            return ()
        columns = self.cases.columns[claims]
        answers = zip(candidate.model.predict(columns), self.champion.predict(columns), self.truth[claims], claims, strict=True)
        return tuple(
            gate.Pair(LABELS[new], LABELS[old], LABELS[true], {"type": self.cases.types[case]}) for new, old, true, case in answers
        )

    def conclude(self, candidate: Candidate, outcome: str) -> None:
        self.verdicts[outcome] += 1
        if outcome == "promote":
            self.champion = candidate.model
            self.window = budget.Window(BUDGET.window)  # another model's confidences rank on their own
        self.candidate = None


def chance_within(rule: gate.Rule, share: float, answers: int, policy: gate.ExamPolicy) -> dict[str, float]:
    """The exact chance of each verdict when the candidate is right in `share` of the decided cases, looking after each answer.

    After the last answer comes the last look, as when the next candidate is there.
    """
    alive, chances = Counter({(0, 0): 1.0}), Counter[str]()
    for count in range(1, answers + 1):
        following: Counter[tuple[int, int]] = Counter()
        for (wins, losses), chance in alive.items():
            following[wins + 1, losses] += chance * share
            following[wins, losses + 1] += chance * (1 - share)
        alive = Counter()
        for state, chance in following.items():
            outcome = gate.apply_rule(rule, *state, policy, is_last=count == answers)
            if outcome == "inconclusive":
                alive[state] = chance
            else:
                chances[outcome] += chance
    return {"promote": chances["promote"], "reject": chances["reject"]}


def replay_all(streams: list[Cases], seeds: int, policy: gate.ExamPolicy) -> dict[tuple[str, str], list[list[Outcome]]]:
    """Outcomes by (rule, kind), then by seed, then by stream."""
    jobs = [(rule, kind, seed) for rule in RULES for kind in KINDS for seed in range(1, seeds + 1)]
    outcomes: dict[tuple[str, str], list[list[Outcome]]] = {(rule, kind): [] for rule in RULES for kind in KINDS}
    for rule, kind, seed in track(jobs, "Replaying streams", console=Console(stderr=True)):
        chosen = replace(policy, rule=rule) if rule in JUDGED else policy
        outcomes[rule, kind].append([Replay(cases, kind, rule, seed, chosen).run() for cases in streams])
    return outcomes


def mean_accuracy(outcomes: list[list[Outcome]]) -> float:
    return fmean(one.accuracy for streams in outcomes for one in streams)


def mean_total(outcomes: list[list[Outcome]], name: str) -> float:
    """Summed over the streams, averaged over seeds."""
    return fmean(sum(getattr(one, name) for one in streams) for streams in outcomes)


def share_of_gain(outcomes: dict[tuple[str, str], list[list[Outcome]]], rule: str) -> float:
    frozen, always = (mean_accuracy(outcomes[name, "honest"]) for name in ("never", "always"))
    return (mean_accuracy(outcomes[rule, "honest"]) - frozen) / (always - frozen)


def show_table(outcomes: dict[tuple[str, str], list[list[Outcome]]]) -> None:
    titles = [
        "rule",
        "honest",
        "share of gain",
        "spoiled",
        "null",
        "promoted honest",
        "rejected honest",
        "promoted null",
        "candidates",
        "labels",
    ]
    table = Table(*titles, title="In brackets: the table by which the design was chosen")
    for rule in RULES:
        known = PUBLISHED[rule]
        means = [mean_accuracy(outcomes[rule, kind]) for kind in KINDS]
        honest, null = outcomes[rule, "honest"], outcomes[rule, "null"]
        table.add_row(
            rule,
            f"{means[0]:.4f} ({known[0]})",
            f"{share_of_gain(outcomes, rule):.0%} ({known[1]:.0%})",
            f"{means[1]:.4f} ({known[2]})",
            f"{means[2]:.4f} ({known[3]})",
            *(f"{mean_total(honest, name):.1f}" for name in ("promotions", "rejections")),
            f"{mean_total(null, 'promotions'):.1f} ({known[4]})",
            f"{mean_total(honest, 'candidates'):.1f}",
            f"{fmean(one.label_share for streams in honest for one in streams):.3f}",
        )
    Console(stderr=True, width=190).print(table)


def figure(name: str, value: float, baseline: float, goal: str, *, holds: bool | None) -> dict[str, Any]:
    ratio = round(value / baseline, 4) if baseline else None
    return {"name": name, "value": round(value, 4), "baseline": round(baseline, 4), "ratio": ratio, "goal": goal, "holds": holds}


def judge_replays(outcomes: dict[tuple[str, str], list[list[Outcome]]]) -> list[dict[str, Any]]:
    """Held against the published table, as differences from the frozen model of the same run; half a unit of its last digit is rounding."""
    figures = []
    for rule in RULES:
        for place, kind in ((0, "honest"), (2, "spoiled"), (3, "null")):
            value, frozen = (mean_accuracy(outcomes[name, kind]) for name in (rule, "never"))
            wanted = PUBLISHED[rule][place] - PUBLISHED["never"][place]
            holds = value - frozen >= wanted - 0.0005 if rule in JUDGED else None
            figures.append(figure(f"{rule}, {kind}: accuracy", value, frozen, f"baseline {wanted:+.3f} or more", holds=holds))
    for rule in JUDGED:
        _, gain, _, _, promotions = PUBLISHED[rule]
        share, promoted = share_of_gain(outcomes, rule), mean_total(outcomes[rule, "null"], "promotions")
        always = mean_total(outcomes["always", "null"], "promotions")
        figures.append(figure(f"{rule}: share of the gain", share, 1.0, f">= {gain}", holds=share >= gain))
        figures.append(figure(f"{rule}, null: promotions", promoted, always, f"<= {promotions}", holds=promoted <= promotions + 0.05))
    return figures


def judge_chances(policy: gate.ExamPolicy) -> list[dict[str, Any]]:
    """Exact chances within the most answers an exam asks for; the published ones were simulated (tolerance half a point)."""
    published = {"posterior": {0.3: 0.005, 0.4: 0.05, 0.5: 0.29}, "anytime": {0.3: 0.002, 0.4: 0.01, 0.5: 0.08}}
    figures = []
    for rule in JUDGED:
        for share, known in published[rule].items():
            chances = chance_within(rule, share, policy.max_asked, policy)
            bound = policy.alpha if (rule, share) == ("anytime", 0.5) else known + 0.005
            holds = chances["promote"] <= bound
            figures.append(figure(f"{rule}: promoted at {share}", chances["promote"], known, f"<= {bound:.3f}", holds=holds))
            figures.append(figure(f"{rule}: rejected at {share}", chances["reject"], 1.0, "reported", holds=None))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    path = Path(os.environ.get("RATCHET_TEST_DATA", "")) / "imr_ca" / "imr_ca_2001_2013.csv.gz"
    if not path.is_file():
        sys.exit(f"{path} is missing: set RATCHET_TEST_DATA to the folder that holds imr_ca/")
    rows = read_rows(path)
    policy = gate.ExamPolicy()
    outcomes = replay_all([take_stream(rows, cut, last) for cut, last in STREAMS], arguments.seeds, policy)
    show_table(outcomes)
    figures = [*judge_replays(outcomes), *judge_chances(policy)]
    print(json.dumps({"benchmark": "exam", "machine": f"{platform.machine()}, {os.cpu_count()} cores", "figures": figures}))


if __name__ == "__main__":
    main()
