"""Lays a claim's fields out for reading: what is a text, a list, a table or a group, whatever the producer sent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

LONG = 60
DEEP = 4
WIDE = 8

Kind = Literal["empty", "text", "number", "list", "table", "group", "raw"]


@dataclass(frozen=True, slots=True)
class Shown:
    """A value as it is to be shown: `text` alone, `items` of a list, `rows` under `columns`, or the `fields` of a group."""

    kind: Kind
    text: str = ""
    items: tuple[Shown, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Shown, ...], ...] = ()
    fields: tuple[Field, ...] = ()

    @property
    def is_long(self) -> bool:
        """Whether it needs the page's whole width."""
        return self.kind in {"table", "group", "raw"} or len(self.text) > LONG or "\n" in self.text or bool(self.items)


@dataclass(frozen=True, slots=True)
class Field:
    """A value under its name."""

    name: str
    value: Shown


def lay_out(fields: Mapping[str, Any], depth: int = 0) -> tuple[Field, ...]:
    """The fields in the producer's order, with readable names."""
    return tuple(Field(name_field(name), show(value, depth)) for name, value in fields.items())


def name_field(name: str) -> str:
    """`billed_amount` as people write it: `Billed amount`."""
    words = " ".join(name.replace("_", " ").split())
    return words[:1].upper() + words[1:] or name


def show(value: Any, depth: int = 0) -> Shown:
    """One value; what is nested deeper than a person can follow is shown as JSON."""
    if value is None or value in ("", [], {}):
        return Shown("empty")
    if isinstance(value, Mapping | list):
        return Shown("raw", json.dumps(value, ensure_ascii=False, indent=2)) if depth >= DEEP else _show_nested(value, depth)
    if isinstance(value, bool):
        return Shown("text", "yes" if value else "no")
    return Shown("text", value) if isinstance(value, str) else Shown("number", str(value).removesuffix(".0"))


def _show_nested(value: Mapping[str, Any] | Sequence[Any], depth: int) -> Shown:
    return Shown("group", fields=lay_out(value, depth + 1)) if isinstance(value, Mapping) else _show_list(value, depth)


def _show_list(values: Sequence[Any], depth: int) -> Shown:
    if all(isinstance(value, Mapping) for value in values):
        columns = tuple(dict.fromkeys(name for value in values for name in value))
        is_flat = not any(isinstance(cell, Mapping | list) for value in values for cell in value.values())
        if is_flat and len(columns) <= WIDE:
            rows = tuple(tuple(show(value.get(name)) for name in columns) for value in values)
            return Shown("table", columns=tuple(name_field(name) for name in columns), rows=rows)
    return Shown("list", items=tuple(show(value, depth + 1) for value in values))
