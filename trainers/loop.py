"""The training loop of every method: steps over packed rows, a dev loss, checkpoints, and the same result after being killed.

The loss of an optimizer step is the weighted mean over its graded tokens: sum(weight * nll) / sum(weight), whatever passes they lie in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from trainers import attention, calibration, checkpoints, memory, optimizers, packing, ranks
from trainers.attempts import Attempt, Progress
from trainers.data import Example
from trainers.schedule import Schedule
from trainers.spec import CHECKPOINTS, Options
from trainers.stopping import Stop

# Rows that are packed together where order doesn't matter.
ROWS_AT_ONCE = 256
TRIED_STEPS = 3
"""Steps whose passes are tried with shared prefixes and without; the first is not timed."""


class DivergedError(ArithmeticError):
    """Training left the numbers: a loss or a gradient is not finite."""


@dataclass(slots=True)
class Counters:
    """What a run has to remember besides its weights; kept in every checkpoint."""

    signature: str
    step: int = 0
    tokens: int = 0
    tokens_saved: int = 0
    graded_tokens: int = 0
    seconds: float = 0.0
    epoch_loss: float = 0.0
    epoch_weight: float = 0.0
    final_loss: float | None = None
    best_dev_loss: float | None = None
    epochs_without_gain: int = 0
    is_finished: bool = False
    sharing_pays: bool = True


@dataclass(frozen=True, slots=True)
class StepLoss:
    """The weighted mean loss of one step, the weight it stands for, what was read and what shared prefixes spared."""

    loss: float
    weight: float
    tokens: int
    tokens_saved: int
    graded_tokens: int


class Loop:
    """Trains the trainable weights of `model` on `examples`; every other method is a part of `run`."""

    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        dev: Sequence[Example],
        options: Options,
        seed: int,
        signature: str,
        attempt: Attempt,
        progress: Progress,
        stop: Stop,
        budget: memory.Budget,
        together: ranks.Ranks = ranks.ALONE,
    ) -> None:
        self.model, self.examples, self.dev, self.options = model, examples, dev, options
        self.attempt, self.progress, self.stop, self.budget = attempt, progress, stop, budget
        self.together = together
        self.schedule = Schedule(len(examples), options.batch_rows, options.epochs, options.warmup, seed)
        self.counters = Counters(signature)
        self.best: checkpoints.Tensors | None = None
        self.parameters = list(checkpoints.trained_parameters(model).values())
        self.updates = optimizers.choose(self.parameters, options, seed)
        self.device = str(model.device)

    def run(self) -> Counters:
        """Train to the end from wherever the run stopped; raises `StoppedError` (checkpointed), `SupersededError` or `DivergedError`."""
        is_resumed = self.resume()
        with attention.packed(self.model), recomputing(self.model, self.options.recompute_layers):
            if not is_resumed and memory.can_run_out(self.device):
                self.calibrate()
            while not self.counters.is_finished:
                self.take_step()
                if self.counters.step % self.schedule.steps_per_epoch == 0 or self.counters.step == self.schedule.steps:
                    self.end_epoch()
                if self.counters.is_finished or self.stop.is_requested or self.counters.step % self.options.checkpoint_steps == 0:
                    self.save()
                self.stop.check()
        if self.best is not None:
            checkpoints.set_weights(self.model, self.best)
        return self.counters

    def resume(self) -> bool:
        """Go back to the newest checkpoint of this run; False when there is none."""
        with self.progress.alive():
            found = checkpoints.load_newest(self.attempt.run_dir, self.counters.signature, self.model, self.updates)
        if found:
            state, self.best = found
            self.counters = Counters(**state)
        return found is not None

    def calibrate(self) -> None:
        """Try the heaviest passes of the run and move no weight: what would find no memory in hours is halved now, or fails."""
        graded, longest = calibration.find_heaviest(self.examples, self.options.batch_rows)
        self.budget.fit(functools.partial(self.try_passes, self.share(graded), self.share(longest)))
        self.drop_gradients()
        self.budget.calibrated_bytes = memory.read_peak(self.device)
        if self.options.share_prefixes and can_be_short(self.device) and not self.updates.is_per_pass:
            self.counters.sharing_pays = self.try_sharing()
        self.progress.write("calibrating", now=True, max_tokens=self.budget.tokens, peak_bytes=self.budget.calibrated_bytes)

    def try_passes(self, graded: Sequence[Example], longest: Sequence[Example], max_tokens: int) -> None:
        """Forward and backward over a pass with the most graded tokens, and one with the most tokens at all.

        As in the midst of a run, there is room taken for moments, and the second one finds gradients. Nothing is shared in it: a prefix of
        the longest rows need not be there in every step.
        """
        memory.reset_peak(self.device)
        self.drop_gradients()
        moments = optimizers.reserve_moments(self.parameters, self.options)
        filled = calibration.fill_pass(longest, self.limit(longest, max_tokens))
        passes = [
            *heapq.nlargest(1, self.pack(graded, max_tokens), key=lambda packed: len(packed.keep)),
            *packing.pack(filled, sum(example.tokens for example in filled), self.device, share_prefixes=False),
        ]
        for packed in passes:
            if isinstance(self.updates, optimizers.InBackward):
                self.updates.begin_pass(without=frozenset(self.parameters))
            torch.autograd.backward(packing.token_losses(self.model, packed).mean())
        del moments

    def try_sharing(self) -> bool:
        """Whether the first steps' passes take less time with shared prefixes; no weight is moved.

        On a card a short step takes as long as the processor needs to start its kernels, however few tokens it reads.
        """
        batches = [[self.examples[row] for row in self.schedule.batch(step)] for step in range(min(TRIED_STEPS, self.schedule.steps))]
        seconds = {}
        for way in (True, False):
            self.counters.sharing_pays = way
            seconds[way] = sum([self.time_passes(rows) for rows in batches][1:])  # the first loads what the others need
        self.drop_gradients()
        return seconds[True] <= seconds[False]

    def time_passes(self, examples: Sequence[Example]) -> float:
        """The seconds of forward and backward over some rows."""
        memory.synchronize(self.device)
        began = time.monotonic()
        self.budget.fit(functools.partial(self.take_passes, examples))
        memory.synchronize(self.device)
        return time.monotonic() - began

    def take_step(self) -> None:
        """One optimizer step on the next rows, and its line of progress."""
        counters, started = self.counters, time.monotonic()
        rate = self.options.learning_rate * self.schedule.rate(counters.step)
        self.updates.begin(counters.step, rate)
        done = self.learn([self.examples[row] for row in self.schedule.batch(counters.step)])
        counters.step += 1
        counters.tokens += done.tokens
        counters.tokens_saved += done.tokens_saved
        counters.graded_tokens += done.graded_tokens
        counters.seconds += time.monotonic() - started
        counters.epoch_loss += done.loss * done.weight
        counters.epoch_weight += done.weight
        self.report(done.loss, rate)

    def learn(self, examples: Sequence[Example]) -> StepLoss:
        """Move the weights once, down the gradient of the weighted mean over all graded tokens of `examples`."""
        if isinstance(self.updates, optimizers.InBackward):
            done, norm = self.take_updates(examples, self.updates)
        else:
            done = self.join(self.budget.fit(functools.partial(self.take_passes, examples)))
            self.together.sum_gradients(self.parameters)
            norm = self.updates.update()
        if not math.isfinite(done.loss + norm):
            raise DivergedError(f"loss {done.loss} and gradient norm {norm} at step {self.counters.step + 1}: lower options.learning_rate")
        return done

    def join(self, done: StepLoss) -> StepLoss:
        """The step of all processes; when one was asked to stop, all are."""
        numbers = (done.loss, done.tokens, done.tokens_saved, self.stop.is_requested)
        loss, tokens, saved, stops = self.together.sum_numbers(*numbers, device=self.device)
        self.stop.is_requested = bool(stops)
        return dataclasses.replace(done, loss=loss, tokens=int(tokens), tokens_saved=int(saved))

    def take_passes(self, examples: Sequence[Example], max_tokens: int) -> StepLoss:
        """Forward and backward over this process's part of `examples` in passes of at most `max_tokens`; the gradients add up."""
        self.drop_gradients()
        packs, weight = self.pack(self.share(examples), max_tokens), weigh(examples)
        total = 0.0
        for packed in packs:
            loss = (packing.token_losses(self.model, packed) * packed.weights).sum() / weight
            torch.autograd.backward(loss)
            total += loss.item()
            self.progress.beat()
        return sum_up(total, examples, packs)

    def share(self, examples: Sequence[Example]) -> Sequence[Example]:
        """This process's part of some rows."""
        return self.together.share(sorted(examples, key=lambda example: example.tokens)) if self.together.size > 1 else examples

    def drop_gradients(self) -> None:
        """Begin without any."""
        for parameter in self.parameters:
            parameter.grad = None

    def take_updates(self, examples: Sequence[Example], updates: optimizers.InBackward) -> tuple[StepLoss, float]:
        """Forward and backward over `examples`, each pass an update of its own, down the gradient of the mean over its own tokens.

        A pass that finds no memory is made again in smaller ones, without the weights that it has moved before. Returns the step's loss
        and the largest norm.
        """
        weight, done, total, norm = weigh(examples), [], 0.0, 0.0
        waiting: list[tuple[packing.Pack, frozenset[torch.Tensor]]]
        waiting = [(packed, frozenset()) for packed in self.pack(examples, self.budget.tokens)]

        def go_on(max_tokens: int) -> None:
            nonlocal total, norm
            while waiting:
                packed, learned = waiting.pop(0)
                if packed.tokens > max_tokens and len(packed.examples) > 1:
                    waiting[:0] = [(smaller, learned) for smaller in self.pack(packed.examples, max_tokens)]
                    continue
                updates.begin_pass(learned)
                try:
                    loss = (packing.token_losses(self.model, packed) * packed.weights).sum()
                    torch.autograd.backward(loss / packed.weights.sum())
                except torch.OutOfMemoryError:
                    waiting.insert(0, (packed, learned | updates.learned))
                    raise
                total, norm = total + loss.item() / weight, max(norm, updates.update())
                done.append(packed)
                self.progress.beat()

        self.budget.fit(go_on)
        return sum_up(total, examples, done), norm

    def pack(self, examples: Sequence[Example], max_tokens: int) -> list[packing.Pack]:
        """The passes over some rows."""
        if not examples:
            return []
        limit, least = self.limit(examples, max_tokens), self.options.accumulation
        return packing.pack(examples, limit, self.device, share_prefixes=self.is_sharing, least_passes=least)

    @property
    def is_sharing(self) -> bool:
        """Whether prefixes are shared."""
        return self.options.share_prefixes and self.counters.sharing_pays

    def limit(self, examples: Sequence[Example], max_tokens: int) -> int:
        """How many tokens a pass over some rows may have: an equal part of them in each of `options.accumulation` passes."""
        return min(max_tokens, math.ceil(sum(example.tokens for example in examples) / self.options.accumulation))

    def report(self, loss: float, rate: float) -> None:
        """Write the step's line of progress and its point on the curves."""
        counters, steps = self.counters, self.schedule.steps
        self.progress.write(
            "training",
            now=counters.step in (1, steps),
            step=counters.step,
            steps=steps,
            epoch=round(counters.step / self.schedule.steps_per_epoch, 3),
            loss=loss,
            tokens_per_second=round(counters.tokens / counters.seconds, 1),
            eta_seconds=round(counters.seconds / counters.step * (steps - counters.step), 1),
            **({"peak_bytes": memory.read_peak(self.device)} if counters.step == 1 else {}),
        )
        self.progress.plot(counters.step, {"loss": loss, "learning_rate": rate})

    def end_epoch(self) -> None:
        """Close the epoch's mean loss; with patience, keep the best weights on dev and finish when nothing gets better."""
        counters = self.counters
        counters.final_loss = counters.epoch_loss / counters.epoch_weight
        counters.epoch_loss = counters.epoch_weight = 0.0
        counters.is_finished = counters.step >= self.schedule.steps
        if not (self.options.patience and self.dev):
            return
        measure = functools.partial(mean_loss, self.model, self.dev, share_prefixes=self.is_sharing, beat=self.progress.beat)
        loss = self.budget.fit(measure)
        # Each process measured it a little otherwise; were one to stop here and another not, they would wait for each other for ever.
        loss = self.together.sum_numbers(loss / self.together.size, device=self.device)[0]
        self.progress.plot(counters.step, {"dev_loss": loss})
        if counters.best_dev_loss is None or loss < counters.best_dev_loss:
            counters.best_dev_loss, counters.epochs_without_gain = loss, 0
            self.best = checkpoints.copy_weights(self.model)
            return
        counters.epochs_without_gain += 1
        counters.is_finished |= counters.epochs_without_gain >= self.options.patience

    def save(self) -> None:
        """Write a checkpoint, unless a newer attempt has begun."""
        if not self.together.is_first:
            return
        self.attempt.check_current()
        folder = self.attempt.folder / CHECKPOINTS
        with self.progress.alive():
            checkpoints.save_checkpoint(folder, self.counters.step, self.model, self.updates, dataclasses.asdict(self.counters), self.best)


def weigh(examples: Sequence[Example]) -> float:
    """What all graded tokens of a step count together."""
    return sum(example.weight * len(example.completion) for example in examples)


def sum_up(loss: float, examples: Sequence[Example], packs: Sequence[packing.Pack]) -> StepLoss:
    """A step's loss, and what was read for it."""
    graded = sum(len(example.completion) for example in examples)
    return StepLoss(loss, weigh(examples), sum(packed.tokens for packed in packs), sum(packed.saved for packed in packs), graded)


def can_be_short(device: str) -> bool:
    """Whether a pass may take less time to compute than to start. On a CPU it may not, and there a run is the same to the last bit."""
    return device != "cpu"


@contextlib.contextmanager
def recomputing(model: Any, every: int) -> Iterator[None]:
    """Keep the activations of all layers but every n-th one, which are computed again in the backward pass; 0 keeps all."""
    if not every:
        yield
        return
    model.gradient_checkpointing_enable({"use_reentrant": False, "every_n_layers": every})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]

    def switch(layer: torch.nn.Module, *_: Any) -> None:
        layer.training = not layer.training

    # A layer is computed twice when it is asked for in training mode. While it computes it is in the other: nothing drops out.
    hooks = [layer.register_forward_pre_hook(switch) for layer in layers]
    hooks += [layer.register_forward_hook(switch, always_call=True) for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            layer.training = False
        model.gradient_checkpointing_disable()


@torch.inference_mode()
def mean_loss(
    model: Any, examples: Sequence[Example], max_tokens: int, *, share_prefixes: bool = True, beat: Callable[[], None] = lambda: None
) -> float:
    """The weighted mean loss over all graded tokens, with `beat` after each pass; to be called under `attention.packed`."""
    total = weight = 0.0
    for start in range(0, len(examples), ROWS_AT_ONCE):
        some = examples[start : start + ROWS_AT_ONCE]
        for packed in packing.pack(some, max_tokens, str(model.device), share_prefixes=share_prefixes):
            total += (packing.token_losses(model, packed).double() * packed.weights).sum().item()
            weight += packed.weights.double().sum().item()
            beat()
    return total / weight
