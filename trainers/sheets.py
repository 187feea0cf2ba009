"""What each model is asked about the score sets: prompts, rendered before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainers import bases, checks, data, encoding, forms
from trainers.encoding import LeftOut
from trainers.spec import Model
from trainers.work import Work


@dataclass(frozen=True, slots=True)
class Sheet:
    """What a model is asked about one score set: a prompt for each row that has one."""

    name: str
    row_ids: list[str]
    prompts: list[str]
    cut: int
    left_out: tuple[LeftOut, ...]


def read_sheets(work: Work) -> list[list[Sheet]]:
    """What each model is asked: a sheet for each score set, in the order of `checks.scored_models`; rendered before weights are loaded.

    Raises `SpecRefusedError` when a run that only scores has nothing left to ask.
    """
    sets = {score_set.name: data.read_score_set(score_set) for score_set in work.spec.score_sets}
    known: dict[tuple[str, ...], list[Sheet]] = {}  # models that are asked in the same words share their sheets
    asked = []
    for model in checks.scored_models(work.spec):
        key = ((model.base or work.spec.base).digest, model.prompt.digest, *model.labels)
        if key not in known:
            known[key] = [read_sheet(work, model, name, *rows) for name, rows in sets.items()]
        asked.append(known[key])
    sheets = [sheet for some in asked for sheet in some]
    left_out = [one for sheet in sheets for one in sheet.left_out]
    work.note_left_out(left_out)
    if work.spec.kind == "score" and left_out and not any(sheet.prompts for sheet in sheets):
        encoding.check_left_out(left_out[0], len(left_out[0].row_ids), 0)
    return asked


def read_sheet(work: Work, model: Model, name: str, row_ids: Sequence[str], inputs: Sequence[Mapping[str, Any]]) -> Sheet:
    """What a model is asked about one score set, as long as its own base can read."""
    base = model.base or work.spec.base
    tokenizer = work.held.tokenizer(base)
    form = forms.find(tokenizer, model.prompt.form)
    limit = encoding.prompt_limit(tokenizer, form, model.labels, encoding.row_limit(work.spec.options, bases.read_context(base)))
    rendered = encoding.render_prompts(tokenizer, model.prompt, inputs, [limit] * len(inputs))
    return Sheet(
        name=name,
        row_ids=[row_ids[index] for index in rendered.texts],
        prompts=list(rendered.texts.values()),
        cut=len(rendered.cut),
        left_out=encoding.list_left_out(name, row_ids, rendered),
    )


def describe_left_out(asked: Sequence[Sequence[Sheet]], lessons: Sequence[LeftOut] = ()) -> dict[str, Any]:
    """The rows that were left out because no prompt can be made of them; each set is told once for models asked in the same words."""
    distinct = {id(sheet): sheet for some in asked for sheet in some}.values()
    return {"left_out": [one.describe() for one in (*lessons, *(one for sheet in distinct for one in sheet.left_out))]}
