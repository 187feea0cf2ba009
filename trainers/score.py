"""Scoring: how probable a model finds each label of a claim. No text is generated.

One forward pass answers a prompt for all labels: the labels' tokens hang side by side behind the prompt's end, and an attention mask
keeps them from seeing each other. On CPU it takes about a fifth less time than a prefix cache with one branch per label.
What many prompts begin with is read once for all of them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from scipy import optimize, special
from torch.nn import functional

from storage import artifacts
from trainers import encoding, last_layer, prefixes
from trainers.spec import SpecRefusedError

TEMPERATURES = (0.05, 100.0)
# What it costs to score a family of prompts by themselves, in tokens: batches that are less full, and a forward pass for their prefix.
FAMILY_COST = 512

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


@dataclass(frozen=True, slots=True)
class Branches:
    """The labels' tokens as the model reads them behind every prompt, the last one of each left out, for it is only predicted.

    `tokens`, `depths` and `sees` describe the columns behind the prompt: the token, how far behind the prompt it stands, and which
    of these columns it attends to. `reads`, `targets` and `owners` describe every label token: the column that predicts it (0 is the
    prompt's last), the token, and the label's index.
    """

    tokens: torch.Tensor
    depths: torch.Tensor
    sees: torch.Tensor
    reads: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor
    labels: int


class Prefix(transformers.DynamicCache):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of what prompts begin with; those of what is read after them are not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.is_read = False

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *rest: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer attends to: the prefix, the same in every row, and then its own."""
        if not self.is_read:
            kept: tuple[torch.Tensor, torch.Tensor] = super().update(keys, values, layer, *rest, **options)
            return kept
        mine = self.layers[layer]
        return join(mine.keys, keys), join(mine.values, values)


def join(prefix: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A prefix [1, heads, tokens, width] before what each row has of its own."""
    return torch.cat([prefix.expand(len(own), -1, -1, -1), own], dim=2)


def score_prompts(model: Any, tokenizer: Any, prompts: Sequence[str], labels: Sequence[str], *, max_tokens: int) -> np.ndarray:
    """Log-probability of each whole label, newline included, after each prompt: float64 of shape [prompts, labels].

    Prompts and labels are given as the model reads and writes them (`Form.wrap`, `Form.say`).

    A forward pass reads at most `max_tokens` tokens, padding and labels included, or a single longer prompt. Equal prompts are read once,
    and so is what many of them begin with.
    Raises `SpecRefusedError` for labels that can't be told apart and `LogitsNotFiniteError` when the model's output is no number.
    """
    encoding.check_labels(tokenizer, labels)
    branches = build_branches([encoding.label_tokens(tokenizer, label) for label in labels], model.device)
    distinct = list(dict.fromkeys(prompts))
    encoded = encoding.encode_prompts(tokenizer, distinct)
    if not all(encoded):
        raise SpecRefusedError("a prompt is empty: the template must render to some text")
    scores = np.empty((len(distinct), len(labels)))
    was_training = model.training
    model.eval()
    try:
        with last_layer.narrowed(model):
            for family in prefixes.find_families(encoded, FAMILY_COST):
                prefix = read_prefix(model, encoded[family.rows[0]][: family.shared])
                for some in batch_by_tokens([len(encoded[row]) - family.shared + len(branches.tokens) for row in family.rows], max_tokens):
                    rows = [family.rows[place] for place in some]
                    scores[rows] = score_batch(model, [encoded[row][family.shared :] for row in rows], branches, prefix, family.shared)
    finally:
        model.train(was_training)
    if not np.isfinite(scores).all():
        raise LogitsNotFiniteError("the model's output holds NaN or infinity: its weights are damaged, go back to the version before")
    place = {prompt: row for row, prompt in enumerate(distinct)}
    return scores[[place[prompt] for prompt in prompts]]


def build_branches(labels: Sequence[Sequence[int]], device: torch.device) -> Branches:
    """Lay the labels' tokens side by side."""
    tokens: list[int] = []
    branch: list[int] = []
    depths: list[int] = []
    reads: list[int] = []
    for index, label in enumerate(labels):
        reads += [0, *range(len(tokens) + 1, len(tokens) + len(label))]
        tokens += label[:-1]
        branch += [index] * (len(label) - 1)
        depths += range(len(label) - 1)
    same = torch.tensor(branch)[:, None] == torch.tensor(branch)[None, :]
    return Branches(
        tokens=torch.tensor(tokens, dtype=torch.long, device=device),
        depths=torch.tensor(depths, dtype=torch.long, device=device),
        sees=same.tril().to(device),
        reads=torch.tensor(reads, device=device),
        targets=torch.tensor([token for label in labels for token in label], device=device),
        owners=torch.tensor([index for index, label in enumerate(labels) for _ in label], device=device),
        labels=len(labels),
    )


def batch_by_tokens(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, as many at a time as fit into `max_tokens` when padded to the longest; one at least."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[row] > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def read_prefix(model: Any, tokens: Sequence[int]) -> Prefix | None:
    """The tokens as the model keeps them for what follows; None for none."""
    if not tokens:
        return None
    prefix = Prefix()
    model(input_ids=torch.tensor([tokens], device=model.device), past_key_values=prefix, logits_to_keep=1, use_cache=True)
    prefix.is_read = True
    return prefix


@torch.inference_mode()
def score_batch(model: Any, prompts: Sequence[Sequence[int]], branches: Branches, prefix: Prefix | None, shared: int) -> np.ndarray:
    """The labels' log-probabilities after the `shared` tokens of the prefix and what each prompt has of its own, from one forward pass.

    Prompts are padded on the left, so that they end in the same column and the language-model head runs from there on only.
    """
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=branches.tokens.device)
    read = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=branches.tokens.device)
    column = torch.cat([torch.arange(longest, device=padding.device), longest + branches.depths])
    positions = shared + (column[None, :] - padding[:, None]).clamp_min(0)
    asked = torch.arange(longest - 1, len(column), device=padding.device)
    logits = model(
        input_ids=torch.cat([read, branches.tokens.expand(len(prompts), -1)], dim=1),
        attention_mask=attention(positions, padding, longest, branches, shared, getattr(model.config, "sliding_window", None)),
        position_ids=positions,
        past_key_values=prefix,
        logits_to_keep=asked,
        asked=asked,
        use_cache=False,
    ).logits.float()
    chosen = logits[:, branches.reads, branches.targets] - logits.logsumexp(-1)[:, branches.reads]
    sums = torch.zeros(len(prompts), branches.labels, dtype=torch.float64, device=padding.device)
    return np.asarray(sums.index_add_(1, branches.owners, chosen.double()).cpu())


def attention(
    positions: torch.Tensor, padding: torch.Tensor, longest: int, branches: Branches, shared: int, window: int | None
) -> torch.Tensor:
    """Who sees whom, bool [rows, 1, columns, shared + columns]: a prompt its past, a branch the prompt and itself, nobody the padding."""
    columns = positions.shape[1]
    sees = torch.ones(columns, columns, dtype=torch.bool, device=padding.device).tril()
    sees[longest:, longest:] = branches.sees
    mask = sees & (torch.arange(columns, device=padding.device) >= padding[:, None])[:, None, :]
    # A row of the mask without any column gives NaN: padding sees itself.
    mask |= torch.eye(columns, dtype=torch.bool, device=padding.device)
    mask = functional.pad(mask, (shared, 0), value=True)
    if window is not None:
        seen = torch.cat([torch.arange(shared, device=padding.device).expand(len(positions), -1), positions], dim=1)
        mask &= positions[:, :, None] - seen[:, None, :] < window
    return mask[:, None]


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
