"""Sequences whose values are made when they are asked for, so that a corpus or a dataset of any size is read in flat memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, overload

import numpy as np

T = TypeVar("T")


class View(Sequence[T], Generic[T]):
    """What `make` makes of each of some places; a part of it is a view too."""

    def __init__(self, make: Callable[[int], T], places: range | np.ndarray) -> None:
        self.make, self.places = make, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> View[T]: ...

    def __getitem__(self, index: int | slice) -> T | View[T]:
        """One value, or a view of some."""
        return View(self.make, self.places[index]) if isinstance(index, slice) else self.make(int(self.places[index]))
