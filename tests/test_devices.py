"""Devices: found with their memory, the smallest that fits first, and one run at a time on each."""

# ruff: noqa: N802  the driver's functions are called so

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pynvml
import pytest
from pydantic import ValidationError
from sqlalchemy import Engine
from structlog.testing import capture_logs

from consumers import delivery, handlers, schemas
from daemon import cards, devices, nvml, placement, plan, policies, training
from daemon.settings import Devices
from storage import db, events, leases, runs
from tests.event_fixtures import LABELS, PRODUCER, make_history
from tests.pipeline_fixtures import ScriptedLauncher, World, make_base, make_settings
from tests.test_plan import LLAMA_8B
from trainers import spec

GIB = 1024**3
RUNS = Path("runs")


@dataclass
class Driver:
    """Plays NVML: cards by name, memory, what is taken of it, and by which processes."""

    cards: list[dict[str, Any]] = field(default_factory=list)
    opened: int = 0
    NVMLError = pynvml.NVMLError

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= len(self.cards):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        found = next((index for index, card in enumerate(self.cards) if card["uuid"] == uuid), None)
        if found is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return found

    def nvmlDeviceGetName(self, handle: int) -> str:
        return str(self.cards[handle]["name"])

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: Any = None) -> Any:
        card = self.cards[handle]
        return SimpleNamespace(total=card["total"], used=card["used"], free=card["total"] - card["used"])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.cards[handle]["processes"].items()]


def make_card(name: str, gib: int, used: int = 0, **processes: Any) -> dict[str, Any]:
    return {"name": name, "uuid": f"GPU-{name}", "total": gib * GIB, "used": used * GIB, "processes": processes.get("by", {})}


DRIVER = Driver([make_card("RTX 3090", 24), make_card("RTX 3060", 12)])


def test_the_played_driver_has_the_shape_of_the_real_one() -> None:
    played = {name for name in vars(Driver) if name.startswith("nvml")}
    for name in played:
        ours, theirs = (inspect.signature(getattr(one, name)).parameters for one in (DRIVER, pynvml))
        assert ours.keys() == theirs.keys(), name
    used = {word for word in dir(pynvml) if f"library.{word}" in inspect.getsource(nvml)}
    assert used - {"NVMLError"} == played
    assert {"total", "used"} <= {name for name, _ in pynvml.c_nvmlMemory_t._fields_}
    assert {"pid", "usedGpuMemory"} <= {name for name, _ in pynvml.c_nvmlProcessInfo_t._fields_}


def test_cards_are_named_as_torch_names_them() -> None:
    found = nvml.read_cards(RUNS, {}, DRIVER)
    assert {name: card.name for name, card in found.items()} == {"cuda:0": "RTX 3090", "cuda:1": "RTX 3060"}
    assert list(nvml.read_cards(RUNS, {"CUDA_VISIBLE_DEVICES": "1"}, DRIVER).values()) == [found["cuda:1"]]
    assert [card.name for card in nvml.read_cards(RUNS, {"CUDA_VISIBLE_DEVICES": "GPU-RTX 3060,0,7,1"}, DRIVER).values()] == [
        "RTX 3060",
        "RTX 3090",
    ]
    assert nvml.read_cards(RUNS, {"CUDA_VISIBLE_DEVICES": ""}, DRIVER) == {}
    assert DRIVER.opened == 0


def test_without_a_driver_there_are_no_cards() -> None:
    assert nvml.read_cards(RUNS) == {}, "this machine has one"


def test_what_the_inference_server_holds_is_taken_and_what_our_worker_holds_is_not(tmp_path: Path) -> None:
    sleep = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", sleep, "trainers.worker", "--runs", str(tmp_path / "runs")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        driver = Driver([make_card("card", 24, 20, by={worker.pid: 15 * GIB, 1: 4 * GIB, 999_999_999: None})])
        assert nvml.read_cards(tmp_path / "runs", {}, driver)["cuda:0"].taken == 5 * GIB
        assert nvml.read_cards(tmp_path / "another", {}, driver)["cuda:0"].taken == 20 * GIB, "whose leases are not ours"
        worker.communicate()


def test_auto_is_every_card_and_without_one_the_cpu() -> None:
    there = nvml.read_cards(RUNS, {}, DRIVER)
    assert [one.name for one in devices.find(Devices(), lambda: there)] == ["cuda:0", "cuda:1"]
    assert [one.name for one in devices.find(Devices(slots=("auto", "cuda:3")), dict)] == ["cpu", "cuda:3"]


def test_auto_leaves_cards_alone_that_another_slot_names() -> None:
    there = {f"cuda:{number}": cards.Card("RTX", "cuda", 24 * GIB) for number in range(3)}
    found = devices.find(Devices(slots=("cuda:0+cuda:1", "auto")), lambda: there)
    assert [one.name for one in found] == ["cuda:0+cuda:1", "cuda:2"]
    assert [one.name for one in devices.find(Devices(slots=("auto", "cuda:1")), lambda: there)] == ["cuda:0", "cuda:2", "cuda:1"]


def test_places_on_the_cpu_share_its_memory_and_settings_may_give_less() -> None:
    [whole] = devices.find(Devices(slots=("cpu",)), dict)
    halves = devices.find(Devices(slots=("cpu", "cpu:1"), memory={"cpu:1": 0.5}), dict)
    assert whole.card is not None
    assert [one.card and one.card.memory for one in halves] == [whole.card.memory // 2, cards.GB // 2]
    assert [one.parts for one in halves] == [("cpu",), ("cpu",)]


def test_several_cards_have_the_room_of_the_smallest_and_an_unknown_one_has_none_that_is_known() -> None:
    there = nvml.read_cards(RUNS, {}, DRIVER)
    [pair] = devices.find(Devices(slots=("cuda:0+cuda:1",)), lambda: there)
    assert (pair.parts, pair.card) == (("cuda:0", "cuda:1"), replace(there["cuda:1"], count=2))
    [unknown] = devices.find(Devices(slots=("cuda:0",)), dict)
    assert unknown.card is None
    [told] = devices.find(Devices(slots=("cuda:0",), memory={"cuda:0": 20}), dict)
    assert told.card == cards.Card("cuda:0", "cuda", 20 * cards.GB)


def test_what_others_hold_lies_in_the_memory_that_the_settings_leave_to_them() -> None:
    def read_free(limit: float, taken: int) -> float:
        card = cards.Card("RTX 3090", "cuda", 24 * cards.GB, taken * cards.GB)
        [found] = devices.find(Devices(slots=("cuda:0",), memory={"cuda:0": limit}), lambda: {"cuda:0": card})
        assert found.card is not None
        return found.card.free / cards.GB

    assert [read_free(12, taken) for taken in (0, 8, 12, 16, 24)] == [12, 12, 12, 8, 0]
    assert read_free(30, 8) == 16


@pytest.mark.parametrize("name", ["gpu0", "cuda", "cuda:0+cuda:1"])
def test_the_memory_of_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="pattern"):
        Devices(memory={name: 4})


@pytest.mark.parametrize("slots", [("cpu", "cpu:1+cpu"), ("cuda:1", "cuda:1"), ("cpu+cpu",)])
def test_nothing_stands_in_two_slots(slots: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, match="stands in two slots"):
        Devices(slots=slots)


def test_a_run_has_cards_or_places_on_the_cpu() -> None:
    with pytest.raises(ValidationError, match="slot cuda:0\\+cpu has cards and the CPU"):
        Devices(slots=("cuda:0+cpu",))


def test_the_smallest_card_that_a_run_fits_is_the_first() -> None:
    there = [devices.Device(f"cuda:{gb}", cards.Card(f"{gb} GB", "cuda", gb * cards.GB)) for gb in (80, 12, 24)]
    options = spec.Options()

    def rank(**changes: Any) -> list[str]:
        config = {**LLAMA_8B, **changes}
        asked = plan.Method("lora", "adapter", 16, options.max_row_tokens, options.max_tokens)
        return [one.name for one in devices.rank({one: plan.plan_memory(config, asked, one.card) for one in there if one.card})]

    assert rank() == ["cuda:24", "cuda:80"]
    assert rank(num_hidden_layers=8) == ["cuda:12", "cuda:24", "cuda:80"]
    assert rank(num_hidden_layers=80, hidden_size=8192, intermediate_size=28672) == []
    unknown = devices.Device("cuda:9", None)
    assert devices.rank({unknown: None}) == [unknown]


@pytest.fixture
def world(engine: Engine, now: Any, tmp_path: Path) -> World:
    """A loop with an agent on a base of Llama 3 8B's shape, on the two cards of `DRIVER`."""
    base = make_base(tmp_path / "base")
    (base / "config.json").write_text(json.dumps(LLAMA_8B))
    settings = make_settings(tmp_path, base).model_copy(update={"devices": Devices()})
    made = World(engine, settings, ScriptedLauncher(script=["hangs"] * 3), now)
    plug_in(made, DRIVER)
    made.import_history(60)
    return made


def plug_in(world: World, driver: Driver) -> None:
    world.pipeline.machinery = replace(world.pipeline.machinery, read_cards=lambda: nvml.read_cards(RUNS, {}, driver))


def read_run(world: World, run: str) -> Any:
    with db.reading(world.engine) as connection:
        return runs.read(connection, run)


def test_a_run_goes_to_the_smallest_card_with_its_plan_in_its_spec(world: World) -> None:
    run = world.ask_for_run()
    world.tick()
    assert (read_run(world, run)["state"], read_run(world, run)["device"]) == ("running", "cuda:0")
    asked = world.launcher.started[-1]
    assert asked.device == "cuda:0"
    assert asked.plan["card"] == {"name": "RTX 3090", "kind": "cuda", "memory": 24 * GIB, "taken": 0, "count": 1}
    assert asked.plan["fits"]
    assert asked.options.recompute_layers == asked.plan["settings"]["checkpoint_every"] > 0
    assert asked.options.max_tokens == asked.plan["settings"]["max_tokens"]


def test_a_small_enough_run_leaves_the_large_card_to_others(world: World) -> None:
    agent = world.agent.model_copy(update={"training": spec.Options(method="qlora")})
    world.settings = world.settings.model_copy(update={"agents": {agent.name: agent}})
    world.restart()
    plug_in(world, DRIVER)
    run = world.ask_for_run()
    world.tick()
    assert read_run(world, run)["device"] == "cuda:1"


def test_a_run_in_4_bits_whose_exam_reads_the_whole_base_goes_where_that_fits(world: World) -> None:
    run = world.ask_for_run(method="qlora")
    world.tick()
    assert read_run(world, run)["device"] == "cuda:0"


def test_a_run_waits_while_others_hold_the_memory_and_says_so(world: World) -> None:
    plug_in(world, Driver([make_card("RTX 3090", 24, used=12), make_card("RTX 3060", 12)]))
    run = world.ask_for_run()
    for _ in range(2):
        world.tick()
    row = read_run(world, run)
    assert row["state"] == "queued"
    assert row["error"].startswith("waits for memory: it needs 18.2 GB, others leave 12.9 GB of cuda:0")
    assert set(world.launcher.idle_ended) == {"cuda:0"}, "what a resident trainer holds there may be what is missing"
    plug_in(world, DRIVER)
    world.tick()
    assert (read_run(world, run)["state"], read_run(world, run)["error"]) == ("running", None)


def test_a_run_that_fits_no_card_is_refused_with_what_would_help(world: World) -> None:
    plug_in(world, Driver([make_card("RTX 3060", 12)]))
    run = world.ask_for_run()
    world.tick()
    row = read_run(world, run)
    assert row["state"] == "failed"
    assert (
        "needs 18.2 GB at the least, cuda:0 has 12.9 GB: set method = qlora in the agent's configuration; or use a card of 24 GB"
        in row["error"]
    )
    assert world.launcher.started == []


def test_memory_that_is_taken_between_claim_and_start_costs_a_retry(world: World) -> None:
    asked = spec.Spec(run_id="r", kind="train", agent="a", base=spec.Base(path=world.agent.base_model, digest="x"))
    plug_in(world, Driver([make_card("RTX 3090", 24, used=12)]))
    with pytest.raises(placement.MemoryTakenError, match=r"others leave 12\.9 GB of cuda:0"):
        placement.suit(world.pipeline.machinery, asked, "cuda:0")


def test_a_later_attempt_on_several_cards_updates_after_the_backward_pass(world: World) -> None:
    world.launcher.script = ["failed"]
    plug_in(world, Driver([make_card("RTX 3090", 24)]))
    run = world.ask_for_run(method="full")
    world.tick()
    pair = Devices(slots=("cuda:0+cuda:1",))
    world.settings = world.settings.model_copy(update={"devices": pair})
    world.restart()
    plug_in(world, Driver([make_card("A6000", 48)] * 2))
    for _ in range(3):
        world.tick(minutes=10)
    assert read_run(world, run)["attempt"] == 2
    assert [(one.device, one.options.optimizer_in_backward) for one in world.launcher.started[:2]] == [
        ("cuda:0", True),
        ("cuda:0+cuda:1", False),
    ]


def test_a_later_attempt_is_placed_by_the_options_that_the_first_was_given(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, placed = placement.find_places, []

    def find_places(machinery: Any, made: Any, run: Any, options: spec.Options) -> Any:
        placed.append(options)
        return genuine(machinery, made, run, options)

    monkeypatch.setattr(placement, "find_places", find_places)
    world.launcher.script = ["failed"]
    world.ask_for_run()
    for _ in range(3):
        world.tick(minutes=10)
    assert placed[:2] == [world.agent.training, world.launcher.started[0].options]
    assert placed[0] != placed[1]


def test_what_the_plan_changed_of_the_options_is_logged(world: World) -> None:
    asked = spec.Spec(run_id="r", kind="train", agent="a", base=spec.Base(path=world.agent.base_model, digest="x"))
    asked = asked.model_copy(update={"options": spec.Options.model_validate({"method": "full"})})
    plug_in(world, Driver([make_card("RTX 3090", 24)]))
    with capture_logs() as said:
        placed = placement.suit(world.pipeline.machinery, asked, "cuda:0")
    assert (placed.options.optimizer_in_backward, placed.options.accumulation, placed.options.clip) == (True, 1, 0)
    [told] = [line for line in said if line["event"] == "run_fitted"]
    assert (told["run"], told["device"], told["options"]["accumulation"], told["options"]["clip"]) == ("r", "cuda:0", 1, 0)


@pytest.fixture
def crowd(engine: Engine, now: Any, tmp_path: Path) -> tuple[World, list[str]]:
    """Two places, and three agents with a run each, in the order in which they are queued."""
    settings = make_settings(tmp_path, make_base(tmp_path / "base"))
    agents = {name: settings.agents["adjudication"].model_copy(update={"name": name}) for name in ("adjudication", "scribe", "third")}
    settings = settings.model_copy(update={"agents": agents, "devices": Devices(slots=("cpu", "cpu:1"))})
    world = World(engine, settings, ScriptedLauncher(script=["hangs"] * 3), now)
    with db.writing(engine) as connection:
        asked = [training.queue(connection, agent, "manual", "x", "ops", {}, now) for agent in agents.values()]
    cases = [make_history(number, now, agent=agent) | {"id": f"{agent}-{number}"} for agent in agents for number in range(20)]
    with db.writing(engine) as connection:
        known = policies.record(connection, agents, now)
        delivery.deliver(connection, schemas.parse(orjson.dumps(cases), schemas.HISTORY), dict.fromkeys(agents, LABELS), PRODUCER, now)
        handlers.handle_batch(connection, events.read_received(connection, 1000), known, now)
    return world, sorted(asked)


def test_a_run_that_can_t_be_placed_does_not_hold_up_the_others(crowd: tuple[World, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    world, asked = crowd
    genuine = placement.find_places

    def find_places(machinery: Any, made: Any, run: Any, options: Any) -> Any:
        return 1 / 0 if run["id"] == asked[0] else genuine(machinery, made, run, options)

    monkeypatch.setattr(placement, "find_places", find_places)
    for _ in range(2):
        world.tick()
    assert [read_run(world, run)["device"] for run in asked] == [None, "cpu", "cpu:1"]


def test_two_agents_train_at_the_same_time_on_two_places(crowd: tuple[World, list[str]]) -> None:
    world, asked = crowd
    for _ in range(2):
        world.tick()
    assert [read_run(world, run)["device"] for run in asked] == ["cpu", "cpu:1", None]
    assert [one.device for one in world.launcher.started] == ["cpu", "cpu"]
    first = read_run(world, asked[0])
    world.launcher.finish(Path(first["folder"]), 1)
    world.settle()
    assert [read_run(world, run)["state"] for run in asked] == ["done", "running", "running"]
    assert read_run(world, asked[2])["device"] == "cpu"


def test_a_card_of_several_is_nobody_elses(engine: Engine, now: Any) -> None:
    one, pair, other = (devices.Device(name, None) for name in ("cuda:1", "cuda:0+cuda:1", "cuda:0"))
    term = timedelta(minutes=10)
    with db.writing(engine) as connection:
        held = devices.claim(connection, [pair], "run-1", 1, now, term)
        assert held is not None
        assert devices.claim(connection, [one, other], "run-2", 1, now, term) is None
        row = {"id": "run-1", "attempt": 1, "device": held.device, "fence": held.fence}
        assert devices.keep(connection, row, now + term, term), "nobody took it meanwhile"
        assert devices.claim(connection, [one, other], "run-2", 1, now + term, term) is None
        assert devices.claim(connection, [one], "run-2", 1, now + 3 * term, term) is not None
        assert not devices.keep(connection, row, now + 3 * term, term), "one of its cards is another's"
        devices.free(connection, row)
        assert devices.claim(connection, [other], "run-3", 1, now + 3 * term, term) is not None
        assert devices.claim(connection, [pair], "run-4", 1, now + 3 * term, term) is None


def test_a_device_whose_holder_is_silent_is_taken_over_under_a_greater_fence(engine: Engine, now: Any) -> None:
    card, term = [devices.Device("cuda:0", None)], timedelta(minutes=10)
    with db.writing(engine) as connection:
        first = devices.claim(connection, card, "run-1", 1, now, term)
        assert devices.claim(connection, card, "run-2", 1, now, term) is None
        second = devices.claim(connection, card, "run-2", 1, now + term, term)
        assert first is not None
        assert second is not None
        assert second.fence > first.fence
        held = {"id": "run-1", "attempt": 1, "device": "cuda:0", "fence": first.fence}
        assert not devices.keep(connection, held, now, term)
        devices.free(connection, held)
        assert leases.holder_of(connection, "device:cuda:0", now + term) == "run-2/1"
