"""Threads for work that may take as long as the process, or hang: nobody waits for them when the process ends."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any


async def run(name: str, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work` in a thread of its own; raises what it raises. Who stops waiting leaves it to itself.

    The threads of `asyncio.to_thread` are for short work: a few that stay would use them up, and one that hangs would keep the process.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def perform() -> None:
        error: BaseException | None = None
        try:
            work(*arguments)
        except BaseException as raised:  # noqa: BLE001  it is raised where the work is waited for
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=perform, name=name, daemon=True).start()
    await done
