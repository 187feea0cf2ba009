"""Drift seen without labels: whether the inputs have changed since the champion's training snapshot."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import scipy

from daemon import significance

LEVEL = 0.01
EXPECTED_MIN = 5.0
"""Chi-square holds where each cell expects so many; rarer values are counted together."""
NUMERIC_MIN = 10
"""A field of numbers with fewer distinct values is a category."""


class FieldDrift(NamedTuple):
    """One field's comparison; `p` is Holm-adjusted over the fields."""

    field: str
    test: Literal["chi-square", "Kolmogorov-Smirnov", "constant"]
    statistic: float
    p: float
    never_seen: float

    @property
    def is_suspicious(self) -> bool:
        """Whether this window alone differs; two in a row make an alarm."""
        return self.p < LEVEL


@dataclass(frozen=True, slots=True)
class DriftReport:
    """One window against a reference. `alarms` are the fields to alarm now, `alarmed` all that this reference was alarmed about."""

    fields: tuple[FieldDrift, ...] = ()
    alarms: tuple[str, ...] = ()
    alarmed: frozenset[str] = frozenset()

    @property
    def suspicious(self) -> frozenset[str]:
        """The fields that would alarm if the next window agrees."""
        return frozenset(one.field for one in self.fields if one.is_suspicious)

    def describe(self) -> dict[str, Any]:
        """The report ready for JSON."""
        fields = [{**one._asdict(), "is_suspicious": one.is_suspicious} for one in self.fields]
        return {"fields": fields, "alarms": list(self.alarms), "alarmed": sorted(self.alarmed)}


def detect(reference: Mapping[str, Sequence[Any]], window: Mapping[str, Sequence[Any]], previous: DriftReport | None) -> DriftReport:
    """Compare the values of each field in the last window with those of the training snapshot.

    `previous` is the report on the window just before, against the same reference; None where there is none. A field alarms when it is
    suspicious in both, and once for each reference: drift that stays is no news. After an alarm the claims of its two windows make the
    best next reference; a snapshot that has grown by a few labels is still mostly the old world and would alarm every second window.
    """
    names = [name for name in reference if name in window and len(reference[name]) and len(window[name])]
    compared = {name: _compare(reference[name], window[name]) for name in names}
    adjusted = significance.adjust_holm({name: p for name, (_, _, p) in compared.items()})
    fields = tuple(
        FieldDrift(name, test, statistic, adjusted[name], _share_unseen(reference[name], window[name]))
        for name, (test, statistic, _) in compared.items()
    )
    before = previous or DriftReport()
    alarms = tuple(one.field for one in fields if one.is_suspicious and one.field in before.suspicious - before.alarmed)
    return DriftReport(fields, alarms, before.alarmed | set(alarms))


Comparison = tuple[Literal["chi-square", "Kolmogorov-Smirnov", "constant"], float, float]


def _compare(reference: Sequence[Any], window: Sequence[Any]) -> Comparison:
    """The test that fits a field's values: (name, statistic, p)."""
    if _is_numeric(reference) and _is_numeric(window):
        return _compare_numbers(reference, window)
    return _compare_categories([_category(value) for value in reference], [_category(value) for value in window])


def _is_numeric(values: Sequence[Any]) -> bool:
    known = [value for value in values if value is not None]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in known) and len(set(known)) >= NUMERIC_MIN


def _compare_numbers(reference: Sequence[Any], window: Sequence[Any]) -> Comparison:
    """Two-sample Kolmogorov-Smirnov; missing values count as below all others, so that a change in how many are missing shows too."""
    samples = [[float("-inf") if value is None else float(value) for value in values] for values in (reference, window)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the exact method says so when it falls back to the asymptotic one
        result = scipy.stats.ks_2samp(*samples)
    return "Kolmogorov-Smirnov", float(result.statistic), float(result.pvalue)


def _compare_categories(reference: Sequence[Hashable], window: Sequence[Hashable]) -> Comparison:
    """Chi-square of homogeneity; values that are too rare to expect enough of are counted together."""
    table = _group_rare(Counter(reference), Counter(window))
    if len(table) <= 1:
        return "constant", 0.0, 1.0
    result = scipy.stats.chi2_contingency([[row[0] for row in table], [row[1] for row in table]], correction=len(table) == 2)  # noqa: PLR2004
    return "chi-square", float(result.statistic), float(result.pvalue)


def _group_rare(reference: Counter[Hashable], window: Counter[Hashable]) -> list[tuple[int, int]]:
    """Counts (reference, window) per value, the rarest merged until each cell expects enough in the smaller sample."""
    share = min(reference.total(), window.total()) / (reference.total() + window.total())
    cells = sorted(((reference[value], window[value]) for value in reference.keys() | window.keys()), key=sum)
    merged = (0, 0)
    while cells and (sum(cells[0]) * share < EXPECTED_MIN or 0 < sum(merged) * share < EXPECTED_MIN):
        smallest = cells.pop(0)
        merged = (merged[0] + smallest[0], merged[1] + smallest[1])
    return [*cells, merged] if sum(merged) else cells


def _share_unseen(reference: Sequence[Any], window: Sequence[Any]) -> float:
    """The share of the window whose value the reference never had."""
    known = {_category(value) for value in reference}
    return sum(_category(value) not in known for value in window) / len(window)


def _category(value: Any) -> Hashable:
    """A value that can be counted; JSON lists and objects by their text."""
    return value if isinstance(value, Hashable) else repr(value)
