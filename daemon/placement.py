"""Where a queued run goes: to the smallest device that it fits, with the settings that make it fit written into its spec."""

from __future__ import annotations

from pathlib import Path

import structlog
from sqlalchemy import RowMapping

from daemon import cards, devices, estimates, plan, shapes
from daemon.devices import Device
from daemon.machinery import Machinery, Makeup
from storage import db, runs
from trainers import spec

log = structlog.get_logger()


class NothingFitsError(ValueError):
    """No device is large enough for a run, whoever else uses it."""


class MemoryTakenError(RuntimeError):
    """The device was large enough a moment ago."""


def find_places(machinery: Machinery, made: Makeup, run: RowMapping, options: spec.Options) -> list[Device]:
    """The devices that a run may be given, the smallest first. None while others hold the memory that it needs.

    Then the resident trainers there are ended too: in a container, process ids are not ours, and the driver can't tell them from others.

    A run that fits no device at all may have any: it is refused there, with the remedies.
    """
    there = devices.find(machinery.settings.devices, machinery.read_cards)
    graded = read_supervised(machinery, run["agent"])
    plans = {device: make_plan(options, run["kind"], made.base_path, device.card, graded) for device in there}
    ranked = devices.rank(plans)
    if ranked:
        return ranked
    waits_for = [device for device, planned in plans.items() if planned is not None and fits_alone(planned)]
    if not waits_for:
        return list(there)
    for part in {part for device in waits_for for part in device.parts}:
        machinery.launcher.end_idle(part)
    _tell(machinery, run, plans[waits_for[0]], waits_for[0])
    return []


def fits_alone(planned: plan.MemoryPlan) -> bool:
    """Whether a run fits a card that nobody else uses, with the most frugal settings at the least."""
    return planned.parts.total <= planned.card.memory


def _tell(machinery: Machinery, run: RowMapping, planned: plan.MemoryPlan | None, device: Device) -> None:
    if planned is None:
        return
    needed, free = planned.parts.total / cards.GB, planned.card.free / cards.GB
    why = f"waits for memory: it needs {needed:.1f} GB, others leave {free:.1f} GB of {device.name}"
    if run["error"] is None or not run["error"].startswith("waits for memory"):
        log.warning("run_waits", run=run["id"], agent=run["agent"], device=device.name, why=why)
        with db.writing(machinery.engine) as connection:
            runs.explain(connection, run, why)


def read_supervised(machinery: Machinery, agent: str) -> float:
    """See `estimates.read_supervised`."""
    with db.reading(machinery.engine) as connection:
        return estimates.read_supervised(connection, agent)


def make_plan(options: spec.Options, kind: str, base: Path, card: cards.Card | None, supervised: float) -> plan.MemoryPlan | None:
    """What a run takes of a card; None where the base can't be counted or the card is not known."""
    if card is None:
        return None
    try:
        return estimates.plan_run(options, kind, base, [card], supervised)[0]
    except (shapes.ShapeUnknownError, estimates.ConfigUnreadableError):
        return None


def suit(machinery: Machinery, asked: spec.Spec, name: str) -> spec.Spec:
    """The spec for the device that the run was given, with its plan and the settings that make it fit.

    Raises `NothingFitsError`, and `MemoryTakenError` when others took the memory meanwhile.
    """
    there = devices.find(machinery.settings.devices, machinery.read_cards)
    device = next((one for one in there if one.name == name), Device(name, None))
    planned = make_plan(asked.options, asked.kind, asked.base.path, device.card, read_supervised(machinery, asked.agent))
    placed = asked.model_copy(update={"device": "+".join(device.parts), "plan": planned and planned.to_json()})
    if planned is None:
        return placed
    if not planned.fits:
        needed = f"{asked.kind} of {asked.base.path.name} needs {planned.parts.total / cards.GB:.1f} GB at the least"
        if fits_alone(planned):
            raise MemoryTakenError(f"{needed}, others leave {planned.card.free / cards.GB:.1f} GB of {name}")
        raise NothingFitsError(f"{needed}, {name} has {planned.card.memory / cards.GB:.1f} GB: {'; or '.join(planned.remedies)}")
    chosen = asked.options.model_copy(update=estimates.choose_options(asked.options, planned.settings))
    changed = {option for option in spec.Options.model_fields if getattr(chosen, option) != getattr(asked.options, option)}
    if changed:
        log.info("run_fitted", run=asked.run_id, agent=asked.agent, device=name, options=chosen.model_dump(include=changed))
    return placed.model_copy(update={"options": chosen})
