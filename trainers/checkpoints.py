"""Where training stopped: trained weights, optimizer moments, random state and counters, as safetensors and JSON.

A checkpoint folder appears whole or not at all, so a run that is killed at any moment goes on from the newest one of any of its attempts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from storage.artifacts import name_partial, write_atomically
from trainers.spec import CHECKPOINTS, CHECKPOINTS_KEPT, STATE

WEIGHTS, OPTIMIZER, RANDOM, BEST = "weights.safetensors", "optimizer.safetensors", "random.safetensors", "best.safetensors"
Tensors = dict[str, torch.Tensor]


class Updates(Protocol):
    """What keeps a state for each parameter; `prepare` makes the places that a checkpoint's tensors are copied into."""

    state: Any

    def prepare(self) -> None:
        """Make those that can't simply be assigned."""


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def copy_weights(model: torch.nn.Module) -> Tensors:
    """A copy of the trained weights, on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in trained_parameters(model).items()}


def set_weights(model: torch.nn.Module, weights: Tensors) -> None:
    """Put trained weights back. Raises `ValueError` when they are those of another model."""
    parameters = trained_parameters(model)
    if parameters.keys() != weights.keys():
        raise ValueError("the checkpoint holds other weights than this run trains")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def save_checkpoint(folder: Path, step: int, model: torch.nn.Module, updates: Updates, state: dict[str, Any], best: Tensors | None) -> None:
    """Write `folder/step-K` and remove all but the last two."""
    partial = name_partial(folder)
    partial.mkdir(parents=True)
    write_tensors(partial / WEIGHTS, copy_weights(model))
    write_tensors(partial / OPTIMIZER, optimizer_tensors(model, updates))
    write_tensors(partial / RANDOM, random_state())
    if best is not None:
        write_tensors(partial / BEST, best)
    write_atomically(partial / STATE, json.dumps(state, indent=2).encode())
    place = folder / f"step-{step}"
    if place.exists():  # the attempt was resumed at this very step
        shutil.rmtree(partial)
    else:
        partial.rename(place)
        sync(folder)
    for old in by_step(folder)[CHECKPOINTS_KEPT:]:
        spent = name_partial(folder)
        old.rename(spent)  # Whoever copies it finds all of it or nothing.
        shutil.rmtree(spent)


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a file of a folder that nobody sees yet, to the disk; straight from the tensors, for there may be gigabytes of them."""
    save_file(tensors, path)
    sync(path)


def load_newest(run_dir: Path, signature: str, model: torch.nn.Module, updates: Updates) -> tuple[dict[str, Any], Tensors | None] | None:
    """Put model, optimizer and random state back to the newest whole checkpoint of any attempt; returns its counters and best weights.

    None when there is no checkpoint with this signature; a damaged one is passed over.
    """
    for place in checkpoints_of_run(run_dir):
        try:
            state = json.loads((place / STATE).read_text())
            weights, moments, random = (load_file(place / name) for name in (WEIGHTS, OPTIMIZER, RANDOM))
            best = load_file(place / BEST) if (place / BEST).exists() else None
        except (OSError, ValueError, SafetensorError):
            continue
        if state.get("signature") != signature:
            continue
        set_weights(model, weights)
        set_optimizer(model, updates, moments)
        set_random_state(random)
        return state, best
    return None


def checkpoints_of_run(run_dir: Path) -> list[Path]:
    """The checkpoints of all attempts, the furthest first; of equal ones the latest attempt's."""
    attempts = sorted((run_dir / "attempts").glob(f"*/{CHECKPOINTS}"), key=lambda path: path.stat().st_mtime, reverse=True)
    return sorted((place for folder in attempts for place in by_step(folder)), key=step_of, reverse=True)


def by_step(folder: Path) -> list[Path]:
    """The whole checkpoints of one attempt, the furthest first."""
    return sorted(folder.glob("step-*"), key=step_of, reverse=True)


def step_of(place: Path) -> int:
    """The K of `step-K`."""
    return int(place.name.removeprefix("step-"))


def optimizer_tensors(model: torch.nn.Module, updates: Updates) -> Tensors:
    """The optimizer's state as `PARAMETER/KEY` tensors; a whole number is one of int64."""
    return {
        f"{name}/{key}": value.detach().cpu().clone() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.int64)
        for name, parameter in trained_parameters(model).items()
        for key, value in updates.state.get(parameter, {}).items()
    }


def set_optimizer(model: torch.nn.Module, updates: Updates, tensors: Tensors) -> None:
    """The reverse of `optimizer_tensors`: all of it lies beside its parameter, a whole number is Python's."""
    parameters = trained_parameters(model)
    updates.prepare()
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        state = updates.state[parameters[name]]
        if isinstance(state.get(key), torch.Tensor):
            state[key].copy_(value)
        else:
            state[key] = int(value) if value.dtype == torch.int64 else value.to(parameters[name].device)


def random_state() -> Tensors:
    """The state of torch's random generators."""
    cards = {f"cuda-{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **cards}


def set_random_state(tensors: Tensors) -> None:
    """The reverse of `random_state`, for as many cards as there are."""
    torch.set_rng_state(tensors["cpu"])
    for index, state in card_states(tensors):
        torch.cuda.set_rng_state(state, index)


def card_states(tensors: Tensors) -> Iterator[tuple[int, torch.Tensor]]:
    """The saved random states of the cards that this machine has."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ((index, tensors[f"cuda-{index}"]) for index in range(count) if f"cuda-{index}" in tensors)


def sync(path: Path) -> None:
    """Make a file, or a rename in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
