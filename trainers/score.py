"""Scoring: how probable a model finds each label of a claim. No text is generated.

One forward pass answers many prompts for all labels. It reads them as a tree: what some of them begin with stands once, and the labels'
tokens hang side by side behind each prompt's end (`trees.py`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import optimize, special

from storage import artifacts
from trainers import attention, encoding, last_layer, lean_layers, trees
from trainers.spec import SpecRefusedError

TEMPERATURES = (0.05, 100.0)
SCHEMA = pa.schema(
    [
        pa.field("set", pa.string(), nullable=False),
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("decision", pa.string(), nullable=False),
        pa.field("confidence", pa.float64(), nullable=False),
        pa.field("probabilities", pa.list_(pa.float64()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float64()), nullable=False),
    ]
)


class LogitsNotFiniteError(ArithmeticError):
    """The model's output holds NaN or infinity: its weights are damaged or diverged in training."""


@dataclass(frozen=True, slots=True)
class Score:
    """One model's answer to one row; `probabilities` and `logprobs` are in label order."""

    set: str
    row_id: str
    model: str
    decision: str
    confidence: float
    probabilities: list[float]
    logprobs: list[float]


def score_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    labels: Sequence[str],
    *,
    max_tokens: int,
    after_pass: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
    """Log-probability of each whole label, newline included, after each prompt: float64 of shape [prompts, labels].

    Prompts and labels are given as the model reads and writes them (`Form.wrap`, `Form.say`).

    A forward pass reads at most `max_tokens` tokens, the labels' included, or what is left of a single longer prompt. Equal prompts are
    read once, and so is what any of them begin with, in whatever passes they lie. `after_pass` is told how many of them were answered.
    Raises `SpecRefusedError` for labels that can't be told apart and `LogitsNotFiniteError` when the model's output is no number.
    """
    encoding.check_labels(tokenizer, labels)
    branches = trees.build_branches([encoding.label_tokens(tokenizer, label) for label in labels])
    trunk, window = trees.Trunk(), find_window(model.config)
    distinct = list(dict.fromkeys(prompts))
    encoded = encoding.encode_prompts(tokenizer, distinct)
    if not all(encoded):
        raise SpecRefusedError("a prompt is empty: the template must render to some text")
    scores = np.empty((len(distinct), len(labels)))
    training = [module for module in model.modules() if module.training] if model.training else []
    if training:
        model.eval()
    try:
        with attention.implemented(model, trees.NAME), last_layer.narrowed(model), lean_layers.used(model):
            done = 0
            for tree in trees.grow(encoded, branches, max_tokens, window, str(model.device)):
                scores[tree.rows] = score_tree(model, tree, branches, trunk)
                done += len(tree.rows)
                after_pass(done)
    finally:
        for module in training:
            module.training = True
    if not np.isfinite(scores).all():
        raise LogitsNotFiniteError("the model's output holds NaN or infinity: its weights are damaged, go back to the version before")
    place = {prompt: row for row, prompt in enumerate(distinct)}
    return scores[[place[prompt] for prompt in prompts]]


def find_window(config: Any) -> int | None:
    """How far back the layers see; None where that is everything. `load_base` takes no base whose layers differ in that."""
    is_full = set(getattr(config, "layer_types", None) or ()) == {"full_attention"}
    return None if is_full else getattr(config, "sliding_window", None)


@torch.inference_mode()
def score_tree(model: Any, tree: trees.Tree, branches: trees.Branches, trunk: trees.Trunk) -> np.ndarray:
    """The labels' log-probabilities after each prompt of the tree, from one forward pass; the head runs where labels are read."""
    trunk.bear(tree)
    logits = model(
        input_ids=tree.input_ids,
        position_ids=tree.position_ids,
        past_key_values=trunk,
        logits_to_keep=tree.asked,
        asked=tree.asked,
        tree=tree,
        use_cache=False,
    ).logits.float()
    logits = logits.view(len(tree.rows), -1, logits.shape[-1])
    reads, targets, owners = (torch.from_numpy(part).to(logits.device) for part in (branches.reads, branches.targets, branches.owners))
    chosen = logits[:, reads, targets] - logits.logsumexp(-1)[:, reads]
    sums = torch.zeros(len(tree.rows), branches.labels, dtype=torch.float64, device=logits.device)
    return np.asarray(sums.index_add_(1, owners, chosen.double()).cpu())


def probabilities(logprobs: np.ndarray, temperature: float) -> np.ndarray:
    """Calibrated probabilities over the label set, rows summing to one: softmax(log-probabilities / temperature)."""
    return np.asarray(special.softmax(np.asarray(logprobs, dtype=np.float64) / temperature, axis=-1))


def fit_temperature(logprobs: np.ndarray, answers: Sequence[int] | np.ndarray) -> float:
    """The temperature that makes the right answers most probable; 1.0 where there is nothing to learn it from.

    A standard normal prior on its logarithm (worth less than one answer) keeps a handful of lucky rows from giving certainty.
    Guo et al. 2017, "On calibration of modern neural networks".
    """
    answers = np.asarray(answers, dtype=np.intp)
    if len(np.unique(answers)) < 2:  # noqa: PLR2004
        return 1.0

    def loss(log_temperature: float) -> float:
        scaled = special.log_softmax(logprobs / np.exp(log_temperature), axis=-1)
        return float(-scaled[np.arange(len(answers)), answers].sum() + log_temperature**2 / 2)

    return float(np.exp(optimize.minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x))


def judge(
    set_name: str, row_ids: Sequence[str], model: str, labels: Sequence[str], logprobs: np.ndarray, temperature: float
) -> list[Score]:
    """The rows of `scores.parquet` for one model's log-probabilities; the decision is the most probable label."""
    return [
        Score(set_name, row_id, model, labels[int(row.argmax())], float(row.max()), row.tolist(), raw.tolist())
        for row_id, row, raw in zip(row_ids, probabilities(logprobs, temperature), logprobs, strict=True)
    ]


def write_scores(path: Path, rows: Iterable[Score]) -> None:
    """Write `rows` as one Parquet file, whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA), buffer, compression="zstd")
    artifacts.write_atomically(path, buffer.getvalue())


def read_scores(path: Path) -> list[Score]:
    """The rows that `write_scores` wrote, in their order."""
    return [Score(**row) for row in pq.read_table(path, schema=SCHEMA).to_pylist()]
