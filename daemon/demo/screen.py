"""What a person sees while the demo runs: a line for each event, and a bar for whatever takes long."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


class Bar:
    """One bar; what it shows may change as the work goes on."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress, self._title = progress, title
        self._task = progress.add_task(title, total=None, figures="")

    def show(self, done: float, whole: float | None, figures: str = "") -> None:
        """Draw how far the work is; `whole` None is unknown."""
        self._progress.update(self._task, completed=done, total=whole, figures=figures)

    def show_training(self, line: Mapping[str, Any] | None) -> None:
        """Draw a trainer's last line of progress."""
        told = line or {}
        done, whole = told.get("step", told.get("rows")), told.get("steps", told.get("of"))
        figures = [str(told.get("phase", "starting")), f"{done}/{whole}" if whole else ""]
        figures.append(f"loss {told['loss']:.3f}" if told.get("loss") is not None else "")
        figures.append(f"{told['eta_seconds']:.0f} s left" if told.get("eta_seconds") is not None else "")
        self.show(done or 0, whole, "  ".join(filter(None, figures)))


class Screen:
    """A terminal, or a file that gets the lines alone."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.began = time.monotonic()

    def say(self, sentence: str) -> None:
        """One thing that happened, with the seconds since the start."""
        self.console.print(f"[dim]{self.seconds:4.0f} s[/]  {sentence}")

    def begin_chapter(self, title: str) -> None:
        """A part of the story."""
        self.console.print(f"\n[bold]{title}[/]")

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    @contextmanager
    def bar(self, title: str) -> Iterator[Bar]:
        """A bar that stands while the work goes on."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True) as progress:
            yield Bar(progress, title)

    def show_table(self, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table, as wide as it needs."""
        grid = Table(*names, box=box.SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            grid.add_row(*row)
        self.console.print(grid)
