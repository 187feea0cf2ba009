"""What models answer to their sheets, and how likely plain text is to them: the second half of every run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainers import adapters, forms, score
from trainers.sheets import Sheet
from trainers.spec import Base, Model
from trainers.work import Work

SCORES = "scores.parquet"
UNTOUCHED = "base"


def score_models(work: Work, models: Sequence[Model], asked: Sequence[Sequence[Sheet]]) -> dict[str, Any]:
    """Let every model answer its sheets and write `scores.parquet`; those on one base follow each other, so that each is loaded once."""
    scores: list[score.Score] = []
    order = list(dict.fromkeys((model.base or work.spec.base).digest for model in models))
    pairs = sorted(zip(models, asked, strict=True), key=lambda pair: order.index((pair[0].base or work.spec.base).digest))
    for model, sheets in pairs:
        for sheet in sheets:
            logprobs = answer(work, model, sheet.prompts)
            scores += score.judge(sheet.name, sheet.row_ids, model.name, model.labels, logprobs, model.temperature)
    score.write_scores(work.attempt.folder / SCORES, scores)
    return measure_forgetting(work, models) | {
        "scores": SCORES,
        "scored_rows": len(scores),
        "scored_prompts_cut": sum(sheet.cut for sheets in asked for sheet in sheets),
    }


def measure_forgetting(work: Work, models: Sequence[Model]) -> dict[str, Any]:
    """How likely plain text is to each model and to the untouched base of the run: nats per token on general text that is held out."""
    path = work.spec.general_texts
    if work.spec.kind != "train" or path is None:
        return {}
    losses = {model.name: measure_text_loss(work, model.base, model.adapter, path) for model in models}
    return {"text_loss": losses | {UNTOUCHED: measure_text_loss(work, None, None, path)}}


def measure_text_loss(work: Work, base: Base | None, adapter: Path | None, path: Path) -> float | None:
    """The loss of what is held out; when it is back nothing holds the base any more, so that there is room for the next one."""
    place = base or work.spec.base
    general = work.read_texts(path, place)
    with wearing(work.load_to_score(base), adapter) as worn:
        return work.measure_loss(worn, general.held_out)


@contextlib.contextmanager
def wearing(base: Any, adapter: Path | None) -> Iterator[Any]:
    """The base with an adapter on it for a while, or the bare base."""
    worn = adapters.load_adapter(base, "scored", adapter) if adapter else base
    try:
        yield worn
    finally:
        if adapter:
            adapters.drop_adapter(worn, "scored")


def answer(work: Work, model: Model, prompts: Sequence[str]) -> np.ndarray:
    """The model's label log-probabilities for each prompt, with signs of life in between."""
    base = work.load_to_score(model.base)
    tokenizer = work.held.tokenizer(model.base or work.spec.base)
    form = forms.find(tokenizer, model.prompt.form)
    labels = [form.say(label) for label in model.labels]

    def tell(done: int) -> None:
        work.stop.check()
        work.progress.write("scoring", model=model.name, rows=done, of=len(prompts))

    tell(0)
    with wearing(base, model.adapter) as worn:
        return work.budget.fit(
            lambda max_tokens: score.score_prompts(worn, tokenizer, prompts, labels, max_tokens=max_tokens, after_pass=tell)
        )
