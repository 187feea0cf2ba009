"""What a step learns from, and how fast, follows from the step alone."""

from __future__ import annotations

import torch

from trainers import optimizers, schedule, spec


def test_the_schedule_sees_every_row_once_an_epoch_and_ends_near_zero() -> None:
    order = schedule.Schedule(rows=10, batch_rows=4, epochs=2, warmup=0.34, seed=1)
    assert (order.steps_per_epoch, order.steps) == (3, 6)
    epochs = [sorted(row for step in range(start, start + 3) for row in order.batch(step)) for start in (0, 3)]
    assert epochs == [list(range(10))] * 2
    assert order.batch(0) != order.batch(3)
    assert [round(order.rate(step), 3) for step in range(6)] == [0.333, 0.667, 1.0, 0.75, 0.5, 0.25]


def test_the_largest_seed_is_taken_at_the_last_step_that_anyone_may_reach() -> None:
    step = 10**12
    assert sorted(schedule.permute(4, spec.SEEDS[-1], step).tolist()) == [0, 1, 2, 3]
    optimizers.begin([], torch.Generator(), spec.SEEDS[-1], step, 1e-3)
