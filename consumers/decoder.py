"""Reads well-formed events at the speed of C. What it gives is what the exact types give; what it can't vouch for is left to them.

Its types are derived from the exact ones, so that a limit is written down once.
"""

from __future__ import annotations

import re
from datetime import datetime
from types import UnionType
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin

import msgspec
from annotated_types import Ge, Le, Lt, MaxLen, MinLen
from pydantic import AwareDatetime, JsonValue, StringConstraints
from pydantic.fields import FieldInfo
from pydantic.types import AllowInfNan
from typing_extensions import get_type_hints, is_typeddict

_DOUBTFUL = re.compile(rb"\\(?:[bfnrt]|u00[01]|u[dD][89a-fA-F])")
"""An escape that may stand for a control character, which no name may hold and JSON can't write otherwise, or for half a character."""
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{3}|\.\d{6})?(?:Z|[+-]\d\d:[0-5]\d)", re.ASCII)
"""The usual shape of a time of RFC 3339; Python's reader takes more shapes than the exact types do, and rounds otherwise."""

SAME = {str: str, float: float, type(None): None, AwareDatetime: str, JsonValue: Any}
"""What the exact types are made of, and what `msgspec` reads in their place."""


class Decoder:
    """Reads JSON arrays of one type of event: a `TypedDict` with Pydantic's constraints, whose times lie in `[earliest, latest)`."""

    def __init__(self, event: type[Any], earliest: datetime, latest: datetime) -> None:
        self._decoder = msgspec.json.Decoder(list[_derive(event)])  # type: ignore[misc]
        self._times = tuple(name for name, hint in get_type_hints(_find_data(event)).items() if hint is AwareDatetime)
        self._earliest, self._latest = earliest, latest

    def decode(self, body: bytes) -> list[dict[str, Any]] | None:
        """The events as the exact types give them; None when something is wrong, or may be."""
        if b"\\" in body and _DOUBTFUL.search(body):
            return None
        try:
            if not body.isascii():
                body.decode()  # what is passed over is not looked into, and must be text too
            events: list[dict[str, Any]] = msgspec.to_builtins(self._decoder.decode(body))
            read, times = self._read_time, self._times
            for event in events:
                data = event["data"]
                for name in times:
                    data[name] = read(data[name])
                if "time" in event:
                    event["time"] = read(event["time"])
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
            return None
        return events

    def _read_time(self, text: str) -> datetime:
        """A time of RFC 3339 in its usual shape. Raises `ValueError` for any other, also for some that are right."""
        if not _TIME.fullmatch(text):
            raise ValueError(text)
        at = datetime.fromisoformat(text)
        if not self._earliest <= at < self._latest:
            raise ValueError(text)
        return at


def _find_data(event: type[Any]) -> type[Any]:
    data: type[Any] = get_type_hints(event)["data"]
    return data


def _derive(type_: Any) -> Any:
    """The type as `msgspec` knows it. Raises `TypeError` for one that it can't vouch for."""
    if is_typeddict(type_):
        return _derive_struct(type_)
    origin, arguments = get_origin(type_), get_args(type_)
    if origin is Annotated:
        return _limit(_derive(arguments[0]), arguments[1:])
    if origin in {Union, UnionType}:
        return Union[tuple(map(_derive, arguments))]  # noqa: UP007  a union of what is known only now
    if origin is dict:
        return dict[_derive(arguments[0]), _derive(arguments[1])]  # type: ignore[misc]
    if origin is Literal or type_ in SAME:
        return SAME.get(type_, type_)
    raise TypeError(f"no type of msgspec is known to take just what {type_} takes")


def _derive_struct(type_: Any) -> type[msgspec.Struct]:
    fields: list[Any] = []
    for name, hint in get_type_hints(type_, include_extras=True).items():
        if get_origin(hint) is NotRequired:  # type: ignore[comparison-overlap]
            fields.append((name, Union[_derive(get_args(hint)[0]), msgspec.UnsetType], msgspec.UNSET))  # noqa: UP007
        else:
            fields.append((name, _derive(hint)))
    is_closed = type_.__pydantic_config__["extra"] == "forbid"
    return msgspec.defstruct(type_.__name__, fields, kw_only=True, forbid_unknown_fields=is_closed, gc=False)


def _limit(type_: Any, constraints: tuple[Any, ...]) -> Any:
    limits: dict[str, Any] = {}
    for constraint in constraints:
        for one in constraint.metadata if isinstance(constraint, FieldInfo) else [constraint]:
            limits |= _read_limit(one)
    is_time = isinstance(limits.get("ge"), datetime)  # read as text, and held to its limits by the decoder
    return type_ if is_time or not limits else Annotated[type_, msgspec.Meta(**limits)]


def _read_limit(constraint: Any) -> dict[str, Any]:
    match constraint:
        case StringConstraints(min_length=low, max_length=high):  # its pattern refuses control characters, see `_DOUBTFUL`
            return {name: value for name, value in (("min_length", low), ("max_length", high)) if value is not None}
        case MinLen(min_length=low):
            return {"min_length": low}
        case MaxLen(max_length=high):
            return {"max_length": high}
        case Ge(ge=low):
            return {"ge": low}
        case Le(le=high):
            return {"le": high}
        case Lt(lt=datetime()) | AllowInfNan():  # JSON has no infinity, and msgspec reads none
            return {}
    raise TypeError(f"no limit of msgspec is known to do just what {constraint} does")
