import json

import pytest
import torch

from trainers import checkpoints, optimizers, spec
from trainers.spec import Options


def model_and_optimizer(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    return model, optimizers.choose(list(model.parameters()), Options(learning_rate=0.1))


def step(model, optimizer):
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.update()


def save(run_dir, model, optimizer, at, attempt=1, signature="s", best=None):
    state = {"signature": signature, "step": at}
    checkpoints.save_checkpoint(run_dir / "attempts" / str(attempt) / "checkpoints", at, model, optimizer, state, best)


def names(run_dir, attempt=1):
    return sorted(path.name for path in (run_dir / "attempts" / str(attempt) / "checkpoints").iterdir())


def test_training_goes_on_from_a_checkpoint_as_it_would_have(tmp_path):
    model, optimizer = model_and_optimizer()
    step(model, optimizer)
    save(tmp_path, model, optimizer, 1)
    drawn = torch.rand(4)
    step(model, optimizer)
    other, fresh = model_and_optimizer(seed=5)
    state, best = checkpoints.load_newest(tmp_path, "s", other, fresh)
    assert (state["step"], best) == (1, None)
    assert torch.equal(torch.rand(4), drawn)
    step(other, fresh)
    assert torch.equal(other.weight, model.weight)


def test_the_last_two_checkpoints_are_kept(tmp_path):
    model, optimizer = model_and_optimizer()
    for at in (5, 10, 15):
        save(tmp_path, model, optimizer, at)
    assert names(tmp_path) == ["step-10", "step-15"]


def test_the_furthest_checkpoint_of_any_attempt_is_taken(tmp_path):
    model, optimizer = model_and_optimizer()
    for attempt, at in ((1, 10), (2, 20), (3, 5)):
        save(tmp_path, model, optimizer, at, attempt)
    assert checkpoints.load_newest(tmp_path, "s", model, optimizer)[0]["step"] == 20


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    model, optimizer = model_and_optimizer()
    step(model, optimizer)
    save(tmp_path, model, optimizer, 10)
    for at, name in ((20, checkpoints.WEIGHTS), (30, spec.STATE)):
        save(tmp_path, model, optimizer, at, attempt=at)
        path = tmp_path / "attempts" / str(at) / "checkpoints" / f"step-{at}" / name
        path.write_bytes(path.read_bytes()[:20])
    assert checkpoints.load_newest(tmp_path, "s", model, optimizer)[0]["step"] == 10


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    model, optimizer = model_and_optimizer()
    partial = tmp_path / "attempts" / "1" / "checkpoints" / ".abc.partial"
    partial.mkdir(parents=True)
    (partial / spec.STATE).write_text(json.dumps({"signature": "s"}))
    assert checkpoints.load_newest(tmp_path, "s", model, optimizer) is None


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path):
    model, optimizer = model_and_optimizer()
    save(tmp_path, model, optimizer, 1, signature="other")
    assert checkpoints.load_newest(tmp_path, "s", model, optimizer) is None


def test_the_best_weights_travel_with_the_checkpoint(tmp_path):
    model, optimizer = model_and_optimizer()
    best = checkpoints.copy_weights(model)
    step(model, optimizer)
    save(tmp_path, model, optimizer, 1, best=best)
    _, loaded = checkpoints.load_newest(tmp_path, "s", model, optimizer)
    checkpoints.set_weights(model, loaded)
    assert torch.equal(model.weight, best["weight"])


def test_weights_of_another_model_are_not_put_on():
    model, _ = model_and_optimizer()
    with pytest.raises(ValueError, match="other weights"):
        checkpoints.set_weights(model, {"strange": torch.ones(1)})
