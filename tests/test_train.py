import json
import math
import os
import shutil
import signal

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tokenizers import normalizers

from storage import artifacts, snapshots
from tests import training_fixtures as runs
from tests.model_fixtures import PROMPT, tiny_base, tiny_tokenizer
from tests.training_fixtures import NoWeights
from trainers import bases, loop, memory, packing, score, spec

SLOW = {"epochs": 25, "checkpoint_steps": 4}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def claims(tmp_path_factory):
    return runs.score_set(tmp_path_factory.mktemp("scores") / "recent.parquet", range(100, 140))


@pytest.fixture(scope="module")
def done(tmp_path_factory, base, data, claims):
    """A run that went well, with the bare base scored beside the candidate."""
    run_dir = tmp_path_factory.mktemp("done")
    asked = runs.make_spec(base, data, {"epochs": 20}, others=(runs.model("bare", temperature=2.0),), score_sets=(claims,))
    assert runs.perform(run_dir, asked) == spec.EXIT_DONE
    return run_dir


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, base, data):
    """The long run that others are compared with, never stopped."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    assert runs.perform(run_dir, runs.make_spec(base, data, SLOW)) == spec.EXIT_DONE
    return run_dir


def adapter_weights(run_dir, attempt=1):
    folder = run_dir / "attempts" / str(attempt)
    return load_file(folder / runs.result(run_dir, attempt)["adapter"]["path"] / "adapter_model.safetensors")


def assert_same_outcome(run_dir, attempt, reference):
    final, expected = (runs.result(*where)["training"]["final_loss"] for where in ((run_dir, attempt), (reference, 1)))
    assert final == pytest.approx(expected, rel=1e-6)
    for name, weight in adapter_weights(reference).items():
        torch.testing.assert_close(adapter_weights(run_dir, attempt)[name], weight, rtol=1e-6, atol=1e-9)


def test_a_run_learns_what_the_labels_say(done):
    result = runs.result(done)
    assert result["status"] == "done"
    assert result["run_id"] == "run-1"
    assert result["training"]["rows"] == 48
    assert result["training"]["dev_rows"] == 12
    assert result["training"]["dev_accuracy"] > 0.8
    scores = score.read_scores(done / "attempts" / "1" / result["scores"])
    right = [one.decision == runs.truth(int(one.row_id)) for one in scores if one.model == "toy-v1.0"]
    assert sum(right) / len(right) > 0.8
    assert {(one.set, one.model) for one in scores} == {("recent", "toy-v1.0"), ("recent", "bare")}


def test_the_adapter_is_peft_format_and_names_its_base_by_digest(done, base):
    result = runs.result(done)
    folder = done / "attempts" / "1" / result["adapter"]["path"]
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert artifacts.digest_folder(folder) == result["adapter"]["digest"]
    assert artifacts.pinned_base(folder) == artifacts.digest_folder(base)
    model, _ = bases.load_base(base, "cpu")
    loaded = peft.PeftModel.from_pretrained(model, str(folder))
    assert loaded.peft_config["default"].r == 16


def test_scores_of_the_candidate_are_calibrated_and_those_of_others_use_their_own_temperature(done):
    result = runs.result(done)
    for one in score.read_scores(done / "attempts" / "1" / "scores.parquet"):
        temperature = 2.0 if one.model == "bare" else result["temperature"]
        assert one.probabilities == pytest.approx(score.probabilities([one.logprobs], temperature)[0].tolist())


def test_progress_has_a_line_for_the_first_and_the_last_step_and_a_rising_heartbeat(done):
    lines = [json.loads(line) for line in (done / "attempts" / "1" / "progress.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["phase"] == "training"]
    assert (steps[0]["step"], steps[-1]["step"], steps[-1]["eta_seconds"]) == (1, 120, 0)
    assert [line["heartbeat"] for line in lines] == list(range(1, len(lines) + 1))
    assert list((done / "attempts" / "1" / "tensorboard").iterdir())


def test_a_run_folder_holds_no_pickle(done):
    suffixes = {path.suffix for path in done.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    assert suffixes == {".json", ".jsonl", ".safetensors", ".parquet"}


def test_the_same_spec_gives_the_same_adapter_and_another_seed_another(tmp_path, base, data):
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        runs.perform(tmp_path / name, runs.make_spec(base, data, {"epochs": 1}, seed=seed))
        digests.append(runs.result(tmp_path / name)["adapter"]["digest"])
    assert digests[0] == digests[1] != digests[2]


def test_the_loss_does_not_depend_on_how_rows_are_packed(tmp_path, base, data):
    losses = []
    for max_tokens in (16, 64, 4096):
        runs.perform(tmp_path / str(max_tokens), runs.make_spec(base, data, {"epochs": 1, "max_tokens": max_tokens}))
        losses.append(runs.result(tmp_path / str(max_tokens))["training"]["final_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_a_step_is_spread_over_as_many_passes_as_asked(tmp_path, base, monkeypatch, share_prefixes):
    packs, losses = [], packing.token_losses
    monkeypatch.setattr(packing, "token_losses", lambda model, packed: packs.append(packed) or losses(model, packed))
    rows = runs.dataset(tmp_path / "set", train=16, dev=0, gold=0)
    policy = runs.model(prompt=spec.Prompt(text="What the policy says. " * 8 + PROMPT))
    options = {"epochs": 1, "batch_rows": 16, "accumulation": 6, "max_tokens": 4096, "share_prefixes": share_prefixes}
    assert runs.perform(tmp_path / "run", runs.make_spec(base, rows, options, candidate=policy)) == spec.EXIT_DONE
    assert sum(len(packed.examples) for packed in packs) == 16
    assert any(packed.saved for packed in packs) == share_prefixes
    assert 6 <= len(packs) <= 8
    tokens = sum(packed.tokens + packed.saved for packed in packs)
    assert max(packed.tokens for packed in packs) <= math.ceil(tokens / 6)


def test_a_warm_start_goes_on_from_its_adapter_and_replays_no_more_than_asked(tmp_path, base, data, done):
    first = runs.result(done)["adapter"]
    folder = done / "attempts" / "1" / first["path"]
    options = {"learning_rate": 1e-9, "epochs": 1, "replay_rows": 10}
    asked = runs.make_spec(base, data, options, init_adapter=folder, init_adapter_digest=first["digest"])
    assert runs.perform(tmp_path, asked) == spec.EXIT_DONE
    assert runs.result(tmp_path)["training"]["rows"] == 10
    for name, weight in adapter_weights(done).items():
        torch.testing.assert_close(adapter_weights(tmp_path)[name], weight, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "knows", "says"),
    [
        ({"policy": "cumulative"}, True, "begins from scratch: leave init_adapter and learned out, or use policy replay"),
        ({"policy": "delta"}, False, "learned is missing: policy delta needs"),
        ({"policy": "replay", "replay_share": 0.2}, False, "learned is missing: policy replay needs"),
        ({"policy": "delta"}, True, "no new rows since its beginning"),
    ],
)
def test_a_policy_without_what_it_needs_is_refused_before_weights_are_loaded(tmp_path, base, data, done, options, knows, says):
    first = runs.result(done)["adapter"]
    begin = {"init_adapter": done / "attempts" / "1" / first["path"], "init_adapter_digest": first["digest"]}
    asked = runs.make_spec(base, data, options, **begin, learned=data if knows else None)
    assert runs.perform(tmp_path, asked, NoWeights()) == spec.EXIT_REFUSED
    assert says in runs.result(tmp_path)["reason"]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_that_begins_from_scratch_has_learned_nothing(tmp_path, base, data, method):
    reason = runs.refuse(tmp_path, runs.make_spec(base, data, {"method": method}, learned=data))
    assert f"learned is {data}, but init_adapter is missing: method {method} goes on from an adapter that learned it" in reason
    assert "leave learned out to begin from scratch" in reason


def test_a_label_is_told_from_another_by_its_tokens(tmp_path, data):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    folder = tiny_base(tmp_path / "base", tokenizer=tokenizer)
    reason = runs.refuse(tmp_path / "run", runs.make_spec(folder, data, candidate=runs.model(labels=("APPROVED", "Approved"))))
    assert "same tokens" in reason
    assert "'Approved'" in reason


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "there is no such file"), (b"\n", "holds no texts"), (b"caf\xe9 " * 40, "isn't UTF-8 text")],
)
def test_texts_to_measure_forgetting_by_are_read_before_weights_are_loaded(tmp_path, base, data, content, told):
    if content is not None:
        (tmp_path / "general.jsonl").write_bytes(content)
    reason = runs.refuse(tmp_path / "run", runs.make_spec(base, data, general_texts=tmp_path / "general.jsonl"))
    assert "general.jsonl" in reason
    assert told in reason


def test_forgetting_is_the_loss_of_plain_text_beside_that_of_the_untouched_base(tmp_path, base, data):
    (tmp_path / "general.txt").write_text("The patient was seen on Monday. " * 40)
    asked = runs.make_spec(base, data, {"epochs": 20}, others=(runs.model("bare"),), general_texts=tmp_path / "general.txt")
    assert runs.perform(tmp_path / "run", asked) == spec.EXIT_DONE
    losses = runs.result(tmp_path / "run")["text_loss"]
    assert losses.keys() == {"toy-v1.0", "bare", "base"}
    assert losses["bare"] == losses["base"] != losses["toy-v1.0"]


@pytest.mark.parametrize("lora", [{"rank": 8}, {"alpha": 16}])
def test_an_adapter_of_another_shape_than_asked_is_not_trained_on(tmp_path, base, data, done, lora):
    first = runs.result(done)["adapter"]
    asked = runs.make_spec(
        base, data, {"lora": lora}, init_adapter=done / "attempts" / "1" / first["path"], init_adapter_digest=first["digest"]
    )
    assert runs.perform(tmp_path, asked, NoWeights()) == spec.EXIT_REFUSED
    assert "has rank 16 and alpha 32, asked are" in runs.result(tmp_path)["reason"]
    assert "warm_start=never" in runs.result(tmp_path)["reason"]


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_that_lacks_tensors_is_not_trained_on_and_leaves_the_base_as_it_was(tmp_path, base, data, done):
    folder = shutil.copytree(done / "attempts" / "1" / runs.result(done)["adapter"]["path"], tmp_path / "half")
    kept = {name: tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items() if ".layers.1." not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    digest = artifacts.digest_folder(folder)
    held = bases.Bases()
    asked = runs.make_spec(base, data, {"policy": "replay"}, init_adapter=folder, init_adapter_digest=digest)
    assert runs.perform(tmp_path / "run", asked, held) == spec.EXIT_REFUSED
    assert "half is not whole, 14 tensors are missing, such as base_model" in runs.result(tmp_path / "run")["reason"]
    assert not any("lora" in name for name, _ in held.load(asked.base, "cpu")[0].named_parameters())


def test_early_stopping_keeps_the_weights_that_were_best_on_dev(tmp_path, base):
    wrong = {runs.LABELS[0]: runs.LABELS[1], runs.LABELS[1]: runs.LABELS[0]}
    rows = [runs.row(number, "train") for number in range(48)]
    rows += [runs.row(number, "dev", answer=wrong[runs.truth(number)]) for number in range(48, 60)]
    snapshots.write(tmp_path / "set", rows, {})
    asked = runs.make_spec(base, tmp_path / "set", {"epochs": 60, "patience": 2})
    assert runs.perform(tmp_path / "run", asked) == spec.EXIT_DONE
    training = runs.result(tmp_path / "run")["training"]
    assert training["epochs"] < 60
    newest = max((tmp_path / "run").glob("attempts/1/checkpoints/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    state = json.loads((newest / "state.json").read_text())
    assert training["dev_loss"] == pytest.approx(state["best_dev_loss"], rel=1e-5)


def test_a_score_run_trains_nothing(tmp_path, base, claims, done):
    first = runs.result(done)["adapter"]
    answering = runs.model(
        adapter=done / "attempts" / "1" / first["path"], adapter_digest=first["digest"], temperature=runs.result(done)["temperature"]
    )
    asked = spec.Spec(run_id="s", kind="score", agent="toy", base=runs.base_of(base), candidate=answering, score_sets=(claims,), threads=1)
    assert runs.perform(tmp_path, asked) == spec.EXIT_DONE
    before = [one for one in score.read_scores(done / "attempts" / "1" / "scores.parquet") if one.model == "toy-v1.0"]
    for one, other in zip(score.read_scores(tmp_path / "attempts" / "1" / "scores.parquet"), before, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, rel=1e-4)
    assert "training" not in runs.result(tmp_path)


def unrenderable(folder, numbers):
    """A score set in which some claims lack the plan that the template needs."""
    made = runs.score_set(folder / "recent.parquet", range(100, 104))
    rows = pq.read_table(made.path).to_pylist()
    for number in numbers:
        rows[number]["input"] = '{"treatment": "secret"}'
    pq.write_table(pa.Table.from_pylist(rows), made.path)
    return made


SHOUTING = spec.Prompt(text="{{ input.plan.upper() }}: ")


def test_a_claim_that_cannot_be_rendered_costs_a_run_only_that_claim(tmp_path, base, data):
    others = (runs.model("shouting", prompt=SHOUTING), runs.model("again", prompt=SHOUTING))
    asked = runs.make_spec(base, data, {"epochs": 1}, others=others, score_sets=(unrenderable(tmp_path, [1, 3]),))
    assert runs.perform(tmp_path, asked) == spec.EXIT_DONE
    result = runs.result(tmp_path)
    why = "the prompt template can't be rendered: 'dict object' has no attribute 'plan'"
    assert result["left_out"] == [{"set": "recent", "rows": 2, "row_ids": ["101", "103"], "reason": why}]
    answered = {(one.model, one.row_id) for one in score.read_scores(tmp_path / "attempts" / "1" / "scores.parquet")}
    assert {row for model, row in answered if model == "shouting"} == {"100", "102"}
    assert {row for model, row in answered if model == "toy-v1.0"} == {"100", "101", "102", "103"}
    assert '"rows_left_out": 2' in (tmp_path / "attempts" / "1" / "progress.jsonl").read_text()


@pytest.mark.parametrize("kind", ["train", "score"])
def test_a_run_of_which_nothing_can_be_rendered_is_refused_before_weights_are_loaded(tmp_path, base, data, kind):
    wordless = spec.Prompt(text="{{ input.gone.upper() }}")
    asked = runs.make_spec(base, data, kind=kind, candidate=runs.model(prompt=wordless), score_sets=(unrenderable(tmp_path, []),))
    assert runs.perform(tmp_path, asked, NoWeights()) == spec.EXIT_REFUSED
    assert "'dict object' has no attribute 'gone'" in runs.result(tmp_path)["reason"]
    assert "let the template do without" in runs.result(tmp_path)["reason"]


def other_base_adapter(folder, done):
    source = done / "attempts" / "1" / runs.result(done)["adapter"]["path"]
    place, _ = artifacts.publish(source, folder)
    artifacts.pin_base(place, "sha256:of-another-base")
    return place


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base": {"digest": "sha256:0"}}, "the base model"),
        ({"dataset_digest": "sha256:0"}, "has root"),
        ({"dataset": None}, "dataset is missing"),
        ({"candidate": None}, "candidate is missing"),
        ({"candidate": {"name": "../out"}}, "becomes a folder"),
        ({"candidate": {"labels": ("YES", "YES")}}, "same tokens"),
        ({"candidate": {"labels": ("YES", "NO")}}, "not one of"),
        ({"candidate": {"prompt": {"text": "{{ input.a.b }}"}}}, "template"),
        ({"init_adapter": "OTHER"}, "was trained on base"),
        ({"init_adapter": "NONE"}, "holds no"),
        ({"score_sets": ({"name": "s", "path": "/nowhere"},)}, "score set s"),
        ({"device": "cuda:99"}, "is not here"),
        ({"device": "abacus"}, "is none"),
        ({"kind": "export"}, "export"),
        ({"epochs": 0}, "spec.json"),
        ({"seed": 2**31}, "seed: Input should be less than 2147483648 (got 2147483648)"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0 (got -1)"),
        ({"seed": True}, "seed: Input should be a valid integer (got True)"),
        ({"options": {"method": "pretrain"}}, "texts is missing"),
    ],
)
def test_a_wrong_run_is_refused_with_the_reason_before_weights_are_loaded(tmp_path, base, data, done, changes, reason):
    asked = json.loads(runs.make_spec(base, data).model_dump_json(by_alias=True))
    if "init_adapter" in changes:
        folder = other_base_adapter(tmp_path / "store", done) if changes["init_adapter"] == "OTHER" else tmp_path
        changes = {"init_adapter": str(folder)}
    for key, value in changes.items():
        asked[key] = asked[key] | value if isinstance(value, dict) else value
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "spec.json").write_text(json.dumps(asked))
    status, sentence = runs.train.run(tmp_path / "run", None, NoWeights(), runs.stopping.Stop())
    assert status == spec.EXIT_REFUSED
    assert reason in sentence
    assert runs.result(tmp_path / "run")["status"] == "refused"
    assert reason in runs.result(tmp_path / "run")["reason"]


def test_a_changed_dataset_is_refused(tmp_path, base):
    folder = runs.dataset(tmp_path / "set")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["root"] = "sha256:0"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert runs.perform(tmp_path / "run", runs.make_spec(base, folder)) == spec.EXIT_REFUSED
    assert "damaged" in runs.result(tmp_path / "run")["reason"]


def test_a_loss_that_is_no_number_fails_the_run(tmp_path, data):
    folder = tiny_base(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert runs.perform(tmp_path / "run", runs.make_spec(folder, data)) == 1
    assert runs.result(tmp_path / "run")["status"] == "failed"
    assert "learning_rate" in runs.result(tmp_path / "run")["reason"]


def test_a_finished_attempt_is_not_done_twice(done):
    before = (done / "attempts" / "1" / "result.json").read_bytes()
    assert runs.train.run(done, None, NoWeights(), runs.stopping.Stop())[0] == spec.EXIT_DONE
    assert (done / "attempts" / "1" / "result.json").read_bytes() == before


def test_the_result_carries_the_fence_of_its_attempt(tmp_path, base, data):
    folder = tmp_path / "attempts" / "3"
    folder.mkdir(parents=True)
    (folder / "attempt.json").write_text('{"fence": 41}')
    runs.perform(tmp_path, runs.make_spec(base, data, {"epochs": 1}))
    assert runs.result(tmp_path, 3)["fence"] == 41
    assert runs.result(tmp_path, 3)["attempt"] == 3


def test_an_older_attempt_publishes_nothing(tmp_path, base, data):
    (tmp_path / "attempts" / "2").mkdir(parents=True)
    spec.write_spec(tmp_path, runs.make_spec(base, data, {"epochs": 1}))
    status, sentence = runs.train.run(tmp_path, 1, bases.Bases(), runs.stopping.Stop())
    assert status == spec.EXIT_RESUMABLE
    assert "superseded by attempt 2" in sentence
    assert not (tmp_path / "attempts" / "1" / "result.json").exists()


def test_a_run_that_is_killed_and_started_again_ends_as_if_nothing_had_happened(tmp_path, base, data, uninterrupted):
    asked = runs.make_spec(base, data, SLOW)
    spec.write_spec(tmp_path, asked)
    process = runs.start("trainers.train", tmp_path, said=tmp_path / "said")
    runs.wait_for(lambda: runs.last_step(tmp_path) >= 8, process)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    reached = runs.last_step(tmp_path)
    assert 8 <= reached < 150
    (tmp_path / "attempts" / "2").mkdir()
    assert runs.perform(tmp_path, asked) == spec.EXIT_DONE
    assert_same_outcome(tmp_path, 2, uninterrupted)


def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_and_goes_on_later(tmp_path, base, data, uninterrupted):
    asked = runs.make_spec(base, data, SLOW | {"checkpoint_steps": 1000})
    spec.write_spec(tmp_path, asked)
    process = runs.start("trainers.train", tmp_path, said=tmp_path / "said")
    runs.wait_for(lambda: '"training"' in read_if_there(tmp_path / "attempts" / "1" / "progress.jsonl"), process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == spec.EXIT_RESUMABLE
    assert 0 < runs.last_step(tmp_path) < 150
    assert not (tmp_path / "attempts" / "1" / "result.json").exists()
    assert runs.perform(tmp_path, asked) == spec.EXIT_DONE
    assert_same_outcome(tmp_path, 1, uninterrupted)


def test_a_trainer_that_slept_past_its_lease_cannot_publish(tmp_path, base, data):
    spec.write_spec(tmp_path, runs.make_spec(base, data, SLOW))
    process = runs.start("trainers.train", tmp_path, "--attempt", 1, said=tmp_path / "said")
    runs.wait_for(lambda: runs.last_step(tmp_path) >= 4, process)
    os.kill(process.pid, signal.SIGSTOP)
    (tmp_path / "attempts" / "2").mkdir()
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == spec.EXIT_RESUMABLE
    assert "superseded" in (tmp_path / "said").read_text()
    assert not (tmp_path / "attempts" / "1" / "result.json").exists()


def read_if_there(path):
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("name", [name for name, field in spec.Options.model_fields.items() if field.annotation is float])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_every_number_of_the_options_is_finite(name, value):
    with pytest.raises(ValidationError, match=f"{name}\n.*finite number"):
        spec.Options.model_validate({name: value})


@pytest.mark.parametrize(("shared", "apart", "goes_on"), [(1.0, 2.0, True), (2.0, 1.0, False)])
def test_where_a_pass_can_be_short_prefixes_are_shared_only_if_that_is_faster(tmp_path, base, data, monkeypatch, shared, apart, goes_on):
    asked = runs.make_spec(base, data, {"epochs": 1})
    assert runs.perform(tmp_path / "plain", asked) == 0
    monkeypatch.setattr(memory, "can_run_out", lambda _: True)
    monkeypatch.setattr(loop, "can_be_short", lambda _: True)
    time_passes, timed = loop.Loop.time_passes, []

    def take_so_long(self, examples):
        assert time_passes(self, examples) > 0
        timed.append(self.is_sharing)
        return shared if self.is_sharing else apart

    monkeypatch.setattr(loop.Loop, "time_passes", take_so_long)
    assert runs.perform(tmp_path / "tried", asked) == 0
    plain, tried = (runs.result(tmp_path / name)["training"] for name in ("plain", "tried"))
    assert timed == [True] * loop.TRIED_STEPS + [False] * loop.TRIED_STEPS
    assert tried["tokens_saved"] == (plain["tokens_saved"] if goes_on else 0)
    assert plain["tokens_saved"] > 0
    assert tried["final_loss"] == pytest.approx(plain["final_loss"], rel=1e-4)
