"""What a section of the configuration is made of: a frozen table, and the kinds of value that many sections have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationInfo

NAME_PATTERN = r"^[^\n\r\t]+$"
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=NAME_PATTERN)]


class Section(BaseModel):
    """A part of the configuration: checked once, frozen, and closed to keys that nobody reads."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, revalidate_instances="always", allow_inf_nan=False, protected_namespaces=()
    )


def place_below_home(value: Any, info: ValidationInfo) -> Path:
    """A path that counts from the folder of `ratchet.toml`, where that is known."""
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("should be a path")
    return Path(info.context["home"]) / Path(value).expanduser() if info.context else Path(value)


HomePath = Annotated[Path, PlainValidator(place_below_home), PlainSerializer(str)]
"""A path that counts from the folder of `ratchet.toml` unless it is absolute."""
