"""What a model reads of a claim and what it is to write, as text and as tokens: the same in training, scoring and serving.

A prompt and its completion are tokenised apart and then joined, so that no token ever spans the boundary.
The completion is `LABEL`, a newline, the expert's rationale when there is one, and the end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainers import forms
from trainers.forms import Form
from trainers.spec import Options, Prompt, SpecRefusedError

Tokenizer = Any
CUT_MARK = "…"
ROWS_NAMED = 20


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


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of each prompt, begun with the tokenizer's BOS when it has one and the prompt doesn't bring it."""
    start = start_of(tokenizer)
    return [ids if ids[:1] == start else start + ids for ids in encode_texts(tokenizer, prompts)]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of one prompt, see `encode_prompts`."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, without any that it doesn't hold itself."""
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []


def start_of(tokenizer: Tokenizer) -> list[int]:
    """What every sequence begins with: the tokenizer's BOS, or nothing."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def encode_completion(tokenizer: Tokenizer, form: Form, answer: str, rationale: str | None) -> list[int]:
    """The tokens that the model is to write: the label and its newline, the rationale, the end of its turn."""
    spoken = without_marks(form, rationale) if rationale else ""
    explained = list(tokenizer(spoken, add_special_tokens=False)["input_ids"]) if spoken else []
    return [*label_tokens(tokenizer, form.say(answer)), *explained, *form.end]


def label_tokens(tokenizer: Tokenizer, label: str) -> list[int]:
    """The tokens of `label` up to and including the newline that ends it."""
    return list(tokenizer(label + "\n", add_special_tokens=False)["input_ids"])


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
