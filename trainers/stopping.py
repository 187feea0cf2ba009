"""How a trainer is asked to stop, and how it says that it did."""

from __future__ import annotations

import signal


class StoppedError(RuntimeError):
    """The run was asked to stop; its checkpoint is written and it can go on later."""


class Stop:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.is_requested = False

    def __call__(self, *_: object) -> None:
        """Handle a signal: note it, the work ends at its next step."""
        self.is_requested = True

    def listen(self) -> None:
        """Take SIGTERM and SIGINT as requests to stop."""
        signal.signal(signal.SIGTERM, self)
        signal.signal(signal.SIGINT, self)

    def check(self) -> None:
        """Raise `StoppedError` when asked to stop."""
        if self.is_requested:
            raise StoppedError("stopped as asked: start the run again to go on from its checkpoint")
