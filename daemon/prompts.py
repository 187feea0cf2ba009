"""A prompt's template, read from its file and checked once, with the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import jinja2
import jinja2.meta
from pydantic import PlainSerializer, PlainValidator, ValidationInfo

from daemon.sections import place_below_home
from trainers import spec


class PromptFile(spec.Prompt):
    """A prompt template and the file that it was read from; None for one that never was a file."""

    path: Path | None = None


def _read_prompt(value: Any, info: ValidationInfo) -> PromptFile:
    if isinstance(value, PromptFile):
        return value
    if not isinstance(value, str):
        raise ValueError("should be the path of a Jinja2 template file")  # noqa: TRY004 — Pydantic collects only ValueError
    path = place_below_home(value, info)
    try:
        text = path.read_text(encoding="utf-8")
        names = jinja2.meta.find_undeclared_variables(jinja2.Environment(autoescape=True).parse(text))
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}): write the prompt template there") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} isn't UTF-8 text: byte {error.start} can't be read") from error
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.message}") from error
    if unknown := names - {"input"}:
        raise ValueError(f"{path} uses {', '.join(sorted(unknown))}: a template sees the claim as `input` and nothing else")
    return PromptFile(text=text, path=path)


PromptPath = Annotated[PromptFile, PlainValidator(_read_prompt), PlainSerializer(lambda prompt: str(prompt.path))]
