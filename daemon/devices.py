"""Devices: which ones runs may use, how much memory each has, and whose each one is now."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, RowMapping

from daemon import cards, plan
from daemon.settings import Devices
from storage import leases

Read = Callable[[], Mapping[str, cards.Card]]


@dataclass(frozen=True, slots=True)
class Device:
    """What one run has to itself: a card, a place on the CPU, or several cards that share its rows. `card` is None where unknown."""

    name: str
    card: cards.Card | None

    @property
    def parts(self) -> tuple[str, ...]:
        """The devices of its processes as torch calls them: every place on the CPU is `cpu`."""
        return tuple("cpu" if part.startswith("cpu") else part for part in self.name.split("+"))


class Claim(NamedTuple):
    """A device and the fence under which it is held."""

    device: str
    fence: int


def find(settings: Devices, read: Read) -> tuple[Device, ...]:
    """The devices that the settings name; `auto` is every CUDA card that the driver knows, else the CPU. Memory is as it is now."""
    there = read()
    names = list(dict.fromkeys(_expand(settings.slots, there)))
    places = sum(part.startswith("cpu") for name in names for part in name.split("+"))
    host = read_host()
    known = {**there, "cpu": dataclasses.replace(host, memory=host.memory // max(1, places))}
    return tuple(Device(name, _find_card(name, known, settings.memory)) for name in names)


def _expand(slots: Sequence[str], there: Mapping[str, cards.Card]) -> Iterator[str]:
    """The slots by name; `auto` leaves cards alone that another slot names."""
    named = {part for slot in slots for part in slot.split("+")}
    for slot in slots:
        yield from ((card for card in there if card not in named) if there else ["cpu"]) if slot == "auto" else [slot]


def _find_card(name: str, known: Mapping[str, cards.Card], limits: Mapping[str, float]) -> cards.Card | None:
    """The card of a device; of several the one with the least room, for each of them holds the whole model."""
    found = [_limit(part, known.get("cpu" if part.startswith("cpu") else part), limits) for part in name.split("+")]
    seen = [card for card in found if card is not None]
    return dataclasses.replace(min(seen, key=lambda card: card.free), count=len(seen)) if len(seen) == len(found) else None


def _limit(part: str, card: cards.Card | None, limits: Mapping[str, float]) -> cards.Card | None:
    """The card with what the settings say of its memory, which is less than there is, or all that is known."""
    if part not in limits:
        return card
    limit = round(limits[part] * cards.GB)
    if card is None:
        return cards.Card(part, "cpu" if part.startswith("cpu") else "cuda", limit)
    left_alone = max(0, card.memory - limit)
    # What others hold lies first in the memory that is left to them.
    return dataclasses.replace(card, memory=card.memory - left_alone, taken=max(0, card.taken - left_alone))


def read_host() -> cards.Card:
    """The CPU as a card, with this machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return cards.Card(model, "cpu", memory)


def rank(plans: Mapping[Device, plan.MemoryPlan | None]) -> list[Device]:
    """Where a run may go, the smallest card first; where no plan fits, nowhere."""
    fitting = [device for device, planned in plans.items() if planned is None or planned.fits]
    return sorted(fitting, key=lambda device: device.card.memory if device.card else 0)


def claim(connection: Connection, devices: Sequence[Device], run: str, attempt: int, now: datetime, term: timedelta) -> Claim | None:
    """Take the first free device for an attempt; None when all are in use. Each card has a lease; the first one's fence counts."""
    holder = _holder(run, attempt)
    for device in devices:
        names = _name_leases(device.name)
        if all(leases.holder_of(connection, name, now) is None for name in names):
            fences = [leases.acquire(connection, name, holder, now, term) for name in names]
            if fences[0] is not None and None not in fences:
                return Claim(device.name, fences[0])
            for name in names:  # somebody else was faster at one of them
                leases.release(connection, name, holder)
    return None


def keep(connection: Connection, run: RowMapping, now: datetime, term: timedelta) -> bool:
    """Hold a run's device for longer. False when another run has taken it, or a card of it: this attempt may not publish any more."""
    holder = _holder(run["id"], run["attempt"])
    first, *others = _name_leases(run["device"])
    if not leases.renew(connection, first, holder, run["fence"], now, term):
        return False
    return all(leases.acquire(connection, name, holder, now, term) is not None for name in others)


def free(connection: Connection, run: RowMapping) -> None:
    """Give a run's device back."""
    for name in _name_leases(run["device"]) if run["device"] is not None else ():
        leases.release(connection, name, _holder(run["id"], run["attempt"]))


def _name_leases(device: str) -> list[str]:
    """One for each part, in an order that is the same for all who take several."""
    return [f"device:{part}" for part in sorted(device.split("+"))]


def _holder(run: str, attempt: int) -> str:
    return f"{run}/{attempt}"
