"""The form of a prompt: what stands around its words, where the model begins to answer, and with which token an answer ends.

`chat` is the checkpoint's own chat template, `instruction` is `### Instruction: … ### Response:`, `plain` the prompt and nothing else.
Prompt and answer are tokenised apart and joined, so a form must be one in which that gives the tokens of the whole.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import jinja2

from trainers.spec import FormName, SpecRefusedError

Tokenizer = Any
ASKED, ANSWERED = "Ratchet asks this", "Ratchet answers that"
MARK = re.compile(r"\[/?[A-Z_]+\]|<[^<>\s]+>|^###.*$", re.MULTILINE)
REMEDY = 'mend it, or set prompt_form to "instruction"'
DATE = "26 Jul 2024"
"""Llama 3's template tells the model this date where nobody tells it another; the day of a run must not change its prompts."""


@dataclass(frozen=True, slots=True)
class Form:
    """Prompt text stands between `before` and `after`; answers begin with `lead` and end with the tokens `end`.

    `marks` are texts that a claim may not hold, for they could end its prompt; `is_stripped` where the template strips what is asked.
    """

    before: str
    after: str
    lead: str
    end: tuple[int, ...]
    marks: tuple[str, ...]
    is_stripped: bool = False

    def wrap(self, prompt: str) -> str:
        """The prompt as the model reads it, up to where it answers; one without words stays empty."""
        return f"{self.before}{prompt.strip() if self.is_stripped else prompt}{self.after}" if prompt.strip() else ""

    def say(self, label: str) -> str:
        """The label as the model writes it."""
        return self.lead + label


@functools.lru_cache(maxsize=16)
def find(tokenizer: Tokenizer, name: FormName) -> Form:
    """The form of this name with this tokenizer. Raises `SpecRefusedError` when the tokenizer or its template lacks a piece."""
    if tokenizer.eos_token_id is None and name != "chat":
        raise SpecRefusedError("the base's tokenizer has no end-of-sequence token: name one in its tokenizer_config.json (eos_token)")
    if name == "chat":
        return read_template(tokenizer)
    before, after = ("### Instruction:\n", "\n\n### Response:\n") if name == "instruction" else ("", "")
    return Form(before, after, "", (tokenizer.eos_token_id,), find_marks(tokenizer, before + after))


def read_template(tokenizer: Tokenizer) -> Form:
    """The form that the checkpoint's chat template makes, found by having it render one question and its answer."""
    if not tokenizer.chat_template:
        raise SpecRefusedError('the base has no chat template: set prompt_form to "instruction" or "plain", or give its tokenizer one')
    asked = render(tokenizer, f" {ASKED} ", None)
    whole = render(tokenizer, f" {ASKED} ", ANSWERED)
    is_stripped = f" {ASKED} " not in asked
    before, found, after = asked.partition(ASKED if is_stripped else f" {ASKED} ")
    lead, has_answer, rest = whole.removeprefix(asked).partition(ANSWERED)
    if not found or not has_answer:
        raise SpecRefusedError(f"the chat template leaves out {'the question' if not found else 'the answer'}: {REMEDY}")
    if not whole.startswith(asked) or lead.strip():
        raise SpecRefusedError(f"the chat template doesn't begin an answer when asked to (add_generation_prompt): {REMEDY}")
    return Form(
        before, after, choose_lead(tokenizer, asked, lead), find_end(tokenizer, rest), find_marks(tokenizer, before + after), is_stripped
    )


def render(tokenizer: Tokenizer, question: str, answer: str | None) -> str:
    """What the template makes of a question, up to where the model answers, or with the answer."""
    turns = [{"role": "user", "content": question}, *([{"role": "assistant", "content": answer}] if answer else [])]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None, date_string=DATE))
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise SpecRefusedError(f"the chat template can't render a question of a user alone ({error}): {REMEDY}") from error


def choose_lead(tokenizer: Tokenizer, asked: str, lead: str) -> str:
    """What an answer begins with, so that question and answer, tokenised apart, have the tokens of the whole."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    whole = tokens(f"{asked}{lead}{ANSWERED}\n")
    apart = tokens(asked)
    # A vocabulary of the SentencePiece kind puts the space before a text by itself.
    return next((one for one in dict.fromkeys((lead, "")) if apart + tokens(f"{one}{ANSWERED}\n") == whole), lead)


def find_end(tokenizer: Tokenizer, rest: str) -> tuple[int, ...]:
    """The tokens from the end of an answer to the first that is special: the turn terminator, which the model has to learn to write."""
    tokens = list(tokenizer(rest, add_special_tokens=False)["input_ids"])
    special = find_special(tokenizer)
    for place, token in enumerate(tokens):
        if token in special:
            return tuple(tokens[: place + 1])
    raise SpecRefusedError(f"the chat template ends an answer with {rest!r}, in which there is no special token: {REMEDY}")


def find_special(tokenizer: Tokenizer) -> dict[int, str]:
    """Every special token with its text, those without a name too (`<|eot_id|>`)."""
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def find_marks(tokenizer: Tokenizer, around: str) -> tuple[str, ...]:
    """The texts that a claim may not hold: special tokens, and what the form puts around a prompt, such as `[/INST]`."""
    marks = {*find_special(tokenizer).values(), *(mark.strip() for mark in MARK.findall(around))}
    return tuple(sorted(marks - {""}, key=lambda mark: (-len(mark), mark)))
