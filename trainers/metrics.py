"""Metrics of a model's answers against the experts': counts, rates and calibration, as plain values for a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import metrics as sk

ECE_BINS = 15


def evaluate(
    answers: Sequence[str], decisions: Sequence[str], labels: Sequence[str], probabilities: np.ndarray | None = None
) -> dict[str, Any]:
    """Everything that a report says about one model on rows whose right answers are known; None stands for what is undefined there.

    The confusion matrix has a row per right answer and a column per decision. With `probabilities` [rows, labels] also `log_loss`,
    `brier` (in [0, 1]) and `ece`. Raises `ValueError` for an answer or decision outside the label set.
    """
    truth, decided = place(answers, labels), place(decisions, labels)
    if len(truth) != len(decided):
        raise ValueError(f"{len(truth)} answers and {len(decided)} decisions: give one decision for each answer")
    report: dict[str, Any] = {"rows": len(truth), "labels": list(labels)}
    if not len(truth):
        return report
    matrix = sk.confusion_matrix(truth, decided, labels=range(len(labels)))
    precision, recall, f1, support = sk.precision_recall_fscore_support(truth, decided, labels=range(len(labels)), zero_division=np.nan)
    rates = error_rates(matrix)
    report |= {
        "accuracy": sk.accuracy_score(truth, decided),
        "macro_f1": np.nanmean(f1) if not np.isnan(f1).all() else np.nan,
        "confusion": matrix.tolist(),
        "by_label": {
            label: {"precision": precision[i], "recall": recall[i], "f1": f1[i], "support": int(support[i]), **rates[i]}
            for i, label in enumerate(labels)
        },
    }
    if probabilities is not None:
        report |= calibration(truth, np.asarray(probabilities, dtype=np.float64))
    result: dict[str, Any] = plain(report)
    return result


def place(values: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """The index of each value in the label set."""
    index = {label: number for number, label in enumerate(labels)}
    strange = sorted(set(values) - index.keys())
    if strange:
        raise ValueError(f"{strange[0]!r} is not in the label set {', '.join(labels)}")
    return np.array([index[value] for value in values], dtype=np.intp)


def error_rates(matrix: np.ndarray) -> list[dict[str, float]]:
    """Of each label: how often it is given where it is wrong, and withheld where it is right."""
    rates = []
    for i in range(len(matrix)):
        right = matrix[i].sum()
        wrong = matrix.sum() - right
        rates.append(
            {
                "false_positive_rate": (matrix[:, i].sum() - matrix[i, i]) / wrong if wrong else math.nan,
                "false_negative_rate": (right - matrix[i, i]) / right if right else math.nan,
            }
        )
    return rates


def calibration(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Log-loss, Brier score halved to [0, 1] and expected calibration error."""
    every = range(probabilities.shape[1])
    return {
        "log_loss": sk.log_loss(truth, probabilities, labels=every),
        "brier": sk.brier_score_loss(truth, probabilities, labels=every, scale_by_half=True),
        "ece": calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == truth),
    }


def calibration_error(confidences: np.ndarray, is_right: np.ndarray, bins: int = ECE_BINS) -> float:
    """How far confidence and accuracy lie apart, averaged over rows, in bins of equal width. Guo et al. 2017, equation 3."""
    bin_of = np.minimum((confidences * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of, weights=confidences - is_right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidences))


def agreement(first: Sequence[str], second: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """How often two models, or two experts, say the same: the share, and Cohen's kappa, which takes chance out of it."""
    one, other = place(first, labels), place(second, labels)
    if not len(one):
        return {"rows": 0, "share": None, "kappa": None}
    one_sided = len({*first, *second}) == 1  # always the same single answer: chance explains everything, kappa is 0/0
    kappa = math.nan if one_sided else sk.cohen_kappa_score(one, other, labels=range(len(labels)))
    result: dict[str, Any] = plain({"rows": len(one), "share": float((one == other).mean()), "kappa": kappa})
    return result


def plain(value: Any) -> Any:
    """The value in JSON's own types; NaN, which JSON lacks, becomes None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else float(value)
    return value
