"""Labelled claims as tokens: what the model reads and what it learns to write, the same in training, scoring and serving.

A prompt and its completion are tokenised apart and then joined, so that no token ever spans the boundary.
The completion is `LABEL`, a newline, the expert's rationale when there is one, and the end-of-sequence token.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow.parquet as pq

from storage import snapshots
from trainers import forms, token_tables
from trainers.forms import Form
from trainers.spec import Options, Prompt, ScoreSet, SpecRefusedError

Tokenizer = Any
CUT_MARK = "…"
ROWS_NAMED = 20
MOST_LEFT_OUT = 0.1
"""When more than this share of the training rows can't be rendered, the template is to be mended first."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: the model reads `prompt` and is graded on `completion`, each token of it with `weight`."""

    prompt: Sequence[int] | np.ndarray
    completion: Sequence[int] | np.ndarray
    weight: float = 1.0

    @property
    def read(self) -> np.ndarray:
        """What the model reads: all but the last token, which is only predicted."""
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in (self.prompt, self.completion[:-1])])

    @property
    def tokens(self) -> int:
        """How many tokens the model reads."""
        return len(self.prompt) + len(self.completion) - 1


@dataclass(frozen=True, slots=True)
class Case:
    """One labelled claim: its prompt as text and as tokens, and the index of its answer in the label set."""

    row_id: str
    prompt: str
    answer: int
    example: Example


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of many claims by their place, which of them were cut, and for each claim of which none can be made, why."""

    texts: dict[int, str]
    cut: set[int]
    problems: dict[int, str]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Rows of a set of which no prompt can be made, with the first one's reason. Never their text."""

    set: str
    row_ids: list[str]
    reason: str

    def describe(self) -> dict[str, Any]:
        """What `result.json` says: how many, the first of them, and why."""
        return {"set": self.set, "rows": len(self.row_ids), "row_ids": self.row_ids[:ROWS_NAMED], "reason": self.reason}


class Cases(Sequence[Case]):
    """Rows of a table as cases, each read from the disk when it is asked for; what was not imported weighs `new_weight`."""

    def __init__(self, table: token_tables.TokenTable, places: np.ndarray, new_weight: float) -> None:
        self.table, self.places, self.new_weight = table, places, new_weight

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Case: ...

    @overload
    def __getitem__(self, index: slice) -> Cases: ...

    def __getitem__(self, index: int | slice) -> Case | Cases:
        """One case, or some."""
        if isinstance(index, slice):
            return Cases(self.table, self.places[index], self.new_weight)
        table, place = self.table, self.places[index]
        weight = 1.0 if table.get("origin", place) == snapshots.IMPORTED else self.new_weight
        example = Example(table.get_tokens("read", place), table.get_tokens("graded", place), weight)
        return Case(table.get("row_id", place), table.get("prompt", place), table.get("answer", place), example)


class Examples(Sequence[Example]):
    """What cases teach."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = cases

    def __len__(self) -> int:
        return len(self.cases)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: int | slice) -> Example | Examples:
        """One example, or some."""
        return Examples(self.cases[index]) if isinstance(index, slice) else self.cases[index].example


@dataclass(frozen=True, slots=True)
class Lessons:
    """What a run learns from. `dev` steers early stopping and the temperature; gold rows are in neither."""

    train: Sequence[Case]
    dev: Sequence[Case]
    prompts_cut: int
    rationales_left_out: int
    left_out: tuple[LeftOut, ...] = ()


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of each prompt, begun with the tokenizer's BOS when it has one and the prompt doesn't bring it."""
    start = start_of(tokenizer)
    return [ids if ids[:1] == start else start + ids for ids in encode_texts(tokenizer, prompts)]


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, without any that it doesn't hold itself."""
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []


def start_of(tokenizer: Tokenizer) -> list[int]:
    """What every sequence begins with: the tokenizer's BOS, or nothing."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of one prompt, see `encode_prompts`."""
    return encode_prompts(tokenizer, [prompt])[0]


def label_tokens(tokenizer: Tokenizer, label: str) -> list[int]:
    """The tokens of `label` up to and including the newline that ends it."""
    return list(tokenizer(label + "\n", add_special_tokens=False)["input_ids"])


def encode_completion(tokenizer: Tokenizer, form: Form, answer: str, rationale: str | None) -> list[int]:
    """The tokens that the model is to write: the label and its newline, the rationale, the end of its turn."""
    spoken = without_marks(form, rationale) if rationale else ""
    explained = list(tokenizer(spoken, add_special_tokens=False)["input_ids"]) if spoken else []
    return [*label_tokens(tokenizer, form.say(answer)), *explained, *form.end]


def check_labels(tokenizer: Tokenizer, labels: Sequence[str]) -> None:
    """Raise `SpecRefusedError` unless every label is told from every other by its tokens."""
    seen: dict[tuple[int, ...], str] = {}
    for label in labels:
        if not label.strip() or "\n" in label:
            raise SpecRefusedError(f"label {label!r} is empty or has a line break: labels are one line of text")
        tokens = tuple(label_tokens(tokenizer, label))
        if tokens in seen:
            raise SpecRefusedError(f"labels {seen[tokens]!r} and {label!r} have the same tokens: rename one of them")
        seen[tokens] = label


def without_marks(form: Form, value: Any) -> Any:
    """The value with every special token and every mark of the form removed from its strings: a claim can't end its own prompt."""

    def clean(text: str) -> str:
        while any(mark in text for mark in form.marks):  # again, for removing one may join the halves of another
            for mark in form.marks:
                text = text.replace(mark, "")
        return text

    return map_strings(value, clean)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with `change` applied to every string in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    return value


def build_prompts(
    tokenizer: Tokenizer, prompt: Prompt, inputs: Sequence[Mapping[str, Any]], limits: Sequence[int]
) -> tuple[list[str], int]:
    """The prompts of many claims by the rule of `render_prompts`, and how many had to be cut.

    Raises `SpecRefusedError` when one of them has none.
    """
    rendered = render_prompts(tokenizer, prompt, inputs, limits)
    for problem in rendered.problems.values():
        raise SpecRefusedError(problem)
    return list(rendered.texts.values()), len(rendered.cut)


def render_prompts(tokenizer: Tokenizer, prompt: Prompt, inputs: Sequence[Mapping[str, Any]], limits: Sequence[int]) -> Prompts:
    """The prompts of many claims, each in at most its limit of tokens; what is wrong with one costs only that one.

    The rule: all text values are cut to one length, the greatest that fits, so the longest lose first and short ones nothing;
    a cut is marked with an ellipsis. When that is not enough, fields are left out from the last one backwards.
    The template's own words are never cut: a claim has no prompt when they alone are too long.
    """
    form = forms.find(tokenizer, prompt.form)
    cleaned = [without_marks(form, fields) for fields in inputs]
    texts: dict[int, str] = {}
    problems: dict[int, str] = {}
    cut: set[int] = set()
    for index, fields in enumerate(cleaned):
        try:
            texts[index] = form.wrap(prompt.render(fields))
        except SpecRefusedError as error:
            problems[index] = str(error)
    for index, tokens in zip(list(texts), encode_prompts(tokenizer, list(texts.values())), strict=True):
        try:
            if not texts[index]:
                raise SpecRefusedError("a prompt is empty: the template must render to some text")  # noqa: TRY301  one place counts
            if len(tokens) > limits[index]:
                texts[index] = cut_prompt(tokenizer, prompt, cleaned[index], limits[index])
                cut.add(index)
        except SpecRefusedError as error:
            problems[index] = str(error)
            del texts[index]
    return Prompts(texts, cut, dict(sorted(problems.items())))


def list_left_out(name: str, row_ids: Sequence[str], rendered: Prompts) -> tuple[LeftOut, ...]:
    """The rows of a set that have no prompt; none at all when each has one."""
    if not rendered.problems:
        return ()
    return (LeftOut(name, [row_ids[index] for index in rendered.problems], next(iter(rendered.problems.values()))),)


def check_left_out(left_out: LeftOut, rows: int, share: float) -> None:
    """Raise `SpecRefusedError` when more than `share` of so many rows have no prompt."""
    if len(left_out.row_ids) > share * rows:
        raise SpecRefusedError(
            f"{left_out.reason} (so with {len(left_out.row_ids)} of the {rows} rows of {left_out.set}, row {left_out.row_ids[0]} for one): "
            "let the template do without what a claim may lack, as in {{ (input.FIELD or '').upper() }}"
        )


def cut_prompt(tokenizer: Tokenizer, prompt: Prompt, fields: Mapping[str, Any], limit: int) -> str:
    """The longest prompt in at most `limit` tokens by the rule of `render_prompts`."""
    form = forms.find(tokenizer, prompt.form)

    def render(characters: int, kept: int) -> str | None:
        some = dict(list(fields.items())[:kept])
        text = form.wrap(prompt.render({name: cut_text(value, characters) for name, value in some.items()}))
        return text if len(encode_prompt(tokenizer, text)) <= limit else None

    whole = len(fields)
    if render(0, whole) is not None:
        longest = bisect(lambda characters: render(characters, whole) is not None, longest_text(fields))
        return render(longest, whole) or ""
    if render(0, 0) is None:
        raise SpecRefusedError(f"the prompt template alone is longer than {limit} tokens: shorten it or raise max_row_tokens")
    kept = bisect(lambda count: render(0, count) is not None, whole)
    return render(0, kept) or ""


def cut_text(value: Any, characters: int) -> Any:
    """The value with its texts cut to `characters` each; the names of fields stay whole."""
    if isinstance(value, str):
        return value if len(value) <= characters else value[:characters] + CUT_MARK
    if isinstance(value, Mapping):
        return {key: cut_text(item, characters) for key, item in value.items()}
    if isinstance(value, list):
        return [cut_text(item, characters) for item in value]
    return value


def longest_text(value: Any) -> int:
    """The length of the longest text anywhere in a JSON value, in characters."""
    if isinstance(value, str):
        return len(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return max((longest_text(item) for item in items), default=0)


def bisect(holds: Callable[[int], bool], top: int) -> int:
    """The greatest number in [0, top] for which `holds`, when it holds at 0 and stops holding once."""
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def row_limit(options: Options, context: int) -> int:
    """How many tokens a row may have: the option, or the base's context where that is shorter."""
    return min(options.max_row_tokens, context)


def prompt_limit(tokenizer: Tokenizer, form: Form, labels: Sequence[str], limit: int) -> int:
    """How many tokens the prompt of a scored claim may have, so that every label fits behind it."""
    return limit - max(len(label_tokens(tokenizer, form.say(label))) for label in labels) - 1


def read_lessons(
    dataset: Path,
    tokenizer: Tokenizer,
    prompt: Prompt,
    labels: Sequence[str],
    options: Options,
    *,
    limit: int,
    warm: bool,
    seed: int,
    learned: Path | None = None,
) -> Lessons:
    """The train and dev rows of a snapshot as tokens; a row of any other split is never even rendered.

    Weights: 1 for an imported row, `options.new_weight` for every other. A warm start takes rows by `choose_rows`, from scratch all are
    used. A row that can't be rendered is left out; raises `SpecRefusedError` when more than `MOST_LEFT_OUT` of the train rows can't.
    """
    table = tokenize_rows(dataset, tokenizer, prompt, labels, limit)
    chosen = {split: table.find(split) for split in ("train", "dev")}
    if warm:
        chosen["train"] = choose_places(table, chosen["train"], options, learned, seed)
    left_out = [one for split, places in chosen.items() for one in find_left_out(table, split, places)]
    for one in left_out:
        if one.set == "train":
            check_left_out(one, len(chosen["train"]), MOST_LEFT_OUT)
    cut, shortened = (sum(sum(table.take(column, some)) for some in chosen.values()) for column in ("is_cut", "is_rationale_left_out"))
    train, dev = (Cases(table, drop_left_out(table, chosen[split]), options.new_weight) for split in ("train", "dev"))
    return Lessons(train, dev, cut, shortened, tuple(left_out))


def tokenize_rows(dataset: Path, tokenizer: Tokenizer, prompt: Prompt, labels: Sequence[str], limit: int) -> token_tables.TokenTable:
    """The rows of a snapshot as tokens, from the file beside it that an earlier run with the same tokenizer, prompt and labels made."""
    asked = [snapshots.read_manifest(dataset)["root"], digest_tokenizer(tokenizer), prompt.model_dump(), list(labels), limit]
    key = hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()
    path = dataset.with_name(f".{dataset.name}.tokens") / f"{key}.arrow"
    if not path.is_file():
        token_tables.write(path, encode_rows(dataset, tokenizer, prompt, labels, limit))
    return token_tables.TokenTable(path)


def digest_tokenizer(tokenizer: Tokenizer) -> str:
    """What decides how a tokenizer turns text into tokens, its chat template too."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    marks = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.all_special_tokens, tokenizer.chat_template]
    return hashlib.sha256(f"{rules}\0{json.dumps(marks)}".encode()).hexdigest()


def encode_rows(dataset: Path, tokenizer: Tokenizer, prompt: Prompt, labels: Sequence[str], limit: int) -> Iterator[list[dict[str, Any]]]:
    """The train and dev rows of a snapshot for `token_tables.write`, a block at a time."""
    columns = ("row_id", "row_digest", "split", "origin", "input", "answer", "rationale")
    rows = (row for row in snapshots.read(dataset, columns) if row["split"] in {"train", "dev"})
    while block := list(itertools.islice(rows, token_tables.ROWS_AT_ONCE)):
        yield encode_block(block, tokenizer, prompt, labels, limit)


def encode_block(
    rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, prompt: Prompt, labels: Sequence[str], limit: int
) -> list[dict[str, Any]]:
    """Some rows as `token_tables.SCHEMA` has them."""
    form = forms.find(tokenizer, prompt.form)
    completions = [encode_answer(tokenizer, form, row, labels, limit) for row in rows]
    limits = [limit - len(completion) for completion, _ in completions]
    rendered = render_prompts(tokenizer, prompt, [json.loads(row["input"]) for row in rows], limits)
    read = dict(zip(rendered.texts, encode_prompts(tokenizer, list(rendered.texts.values())), strict=True))
    return [
        {
            "row_id": row["row_id"],
            "row_digest": row["row_digest"],
            "origin": row["origin"],
            "split": row["split"],
            "answer": labels.index(row["answer"]),
            "prompt": rendered.texts.get(index),
            "problem": rendered.problems.get(index),
            "read": read.get(index, []),
            "graded": completion,
            "is_cut": index in rendered.cut,
            "is_rationale_left_out": is_left_out,
        }
        for index, (row, (completion, is_left_out)) in enumerate(zip(rows, completions, strict=True))
    ]


def find_left_out(table: token_tables.TokenTable, split: str, places: np.ndarray) -> Iterator[LeftOut]:
    """The rows at these places that have no prompt, if there are any."""
    problems = table.take("problem", places)
    failed = [index for index, problem in enumerate(problems) if problem is not None]
    if failed:
        yield LeftOut(split, table.take("row_id", places[failed]), problems[failed[0]])


def drop_left_out(table: token_tables.TokenTable, places: np.ndarray) -> np.ndarray:
    """The places whose rows have a prompt."""
    return places[[problem is None for problem in table.take("problem", places)]]


def choose_places(table: token_tables.TokenTable, places: np.ndarray, options: Options, learned: Path | None, seed: int) -> np.ndarray:
    """Where the rows lie that a warm start is trained on, see `choose_rows`."""
    names = ("row_id", "row_digest", "origin")
    columns = [table.take(name, places) for name in names]
    rows = [dict(zip((*names, "place"), row, strict=True)) for row in zip(*columns, places, strict=True)]
    return np.array([row["place"] for row in choose_rows(rows, options, learned, seed)], dtype=np.int64)


def choose_rows(rows: Sequence[dict[str, Any]], options: Options, learned: Path | None, seed: int) -> list[dict[str, Any]]:
    """What a warm start is trained on: the new rows, and of those in the snapshot `learned` what the policy replays."""
    known = {row["row_digest"] for row in snapshots.read(learned, ("row_digest",))} if learned and options.needs_learned else set()
    old = [row for row in rows if row["row_digest"] in known]
    share = 0.0 if options.policy == "delta" else options.replay_share
    kept = {row["row_id"] for row in draw(old, round(share * len(old)), seed)}
    return replay([row for row in rows if row["row_digest"] not in known or row["row_id"] in kept], options.replay_rows, seed)


def draw(rows: Sequence[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """So many of the rows, the same ones for the same seed whatever else is in the set."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}\0{row['row_id']}".encode()).digest())[:count]


def replay(rows: Sequence[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """All rows that were not imported and `count` of the imported, the same ones for the same seed whatever else is in the set."""
    kept = {row["row_id"] for row in draw([row for row in rows if row["origin"] == snapshots.IMPORTED], count, seed)}
    return [row for row in rows if row["origin"] != snapshots.IMPORTED or row["row_id"] in kept]


def encode_answer(tokenizer: Tokenizer, form: Form, row: Mapping[str, Any], labels: Sequence[str], limit: int) -> tuple[list[int], bool]:
    """A row's completion, and whether its rationale was left out because the row would be mostly rationale.

    Raises `SpecRefusedError` for an answer that is not in the label set.
    """
    if row["answer"] not in labels:
        raise SpecRefusedError(f"row {row['row_id']} has answer {row['answer']!r}, not one of {', '.join(labels)}: build the dataset anew")
    completion = encode_completion(tokenizer, form, row["answer"], row["rationale"])
    if len(completion) <= limit // 2 or not row["rationale"]:
        return completion, False
    return encode_completion(tokenizer, form, row["answer"], None), True


def read_score_set(score_set: ScoreSet) -> tuple[list[str], list[dict[str, Any]]]:
    """The row ids and the input fields of a score set."""
    table = pq.read_table(score_set.path, columns=["row_id", "input"])
    return table["row_id"].to_pylist(), [json.loads(text) for text in table["input"].to_pylist()]
