"""Write the pages of `docs/` that follow from the code: `make docs`. tests/test_docs.py fails when one is out of date."""

from __future__ import annotations

import enum
import functools
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import typer.cli
from fastapi import FastAPI, routing
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from consumers import announcements, schemas
from daemon import agents, cards, cli, estimates, plan, settings
from daemon.web import app as web
from storage import db, schema
from trainers import spec

DOCS = Path(__file__).parents[1] / "docs"

CONFIGURATION = """\
# Configuration

`ratchet init DIR` writes a commented `ratchet.toml`; every command finds it in the current folder, by `--config FILE` or by
`RATCHET_CONFIG`. It is read once, at start. An unknown key, a wrong type or a value out of range is refused with the key, the
value and what would be right. `ratchet config show` prints the values in force and where each came from.

Any key can be overridden by a variable: `RATCHET_`, then the key in capitals with `__` for each dot. So `server.port` is
`RATCHET_SERVER__PORT`, and the threshold of the agent `medical-analysis` is `RATCHET_AGENTS__MEDICAL_ANALYSIS__THRESHOLD`. Lists
are written as in TOML: `RATCHET_DEVICES__SLOTS='["cuda:0"]'`. Paths count from the folder of `ratchet.toml`.

This page is generated from the code: change the descriptions there, then run `make docs`.
"""

HTTP_API = """\
# HTTP API

The daemon answers on `server.host` and `server.port` (`127.0.0.1:8420`). `/openapi.json` is this page for programs. Programs send
`Authorization: Bearer TOKEN`; `ratchet tokens add NAME --role ROLE` makes one. What is refused gets
`{"error": {"field": …, "value": …, "remedy": …}}`. Of several events in one body the good ones are stored, and each gets its result.
The events themselves are described in [events.md](events.md). For people there are pages: `/login`, `/review` and `/status`.

This page is generated from the code: change the routes there, then run `make docs`.
"""

HARDWARE = """\
# Hardware

What a training takes of its card, before it begins. `ratchet plan` tells it for a base and an agent's options; the daemon asks the same
before each run, takes the smallest card that is large enough, and writes the plan into `spec.json`. `daemon.plan` is pure and reads the
base's `config.json` alone.

This page is generated from the planner: change it there or in `scripts/write_docs.py`, then run `make docs`.

## What fits where
In GB (10^9 bytes) with the default options: rows of up to 2,048 tokens, passes of up to 4,096. A cell names what is taken at the peak, the
tokens of a pass, and which layers' activations are computed twice (gradient checkpointing, a third more to compute; on a
fast card with short steps half as fast). *bf16*: the adapter
too is kept in bf16. *8-bit moments*: those of the adapter, by bitsandbytes' AdamW. *in backward*: the optimizer works in the backward pass,
so gradients are neither summed nor clipped. All weights have 8-bit moments that are paged to the host's memory. *no*: so much would be
needed at the least.
"""

HARDWARE_GUIDE = """
## Beside the fine-tuning guide
The guide that many begin with names cards for 7B to 70B models. It does not say for which lengths; here rows may have 2,048 tokens, as its
own script has them.
"""

HARDWARE_END = """
Its memory for LoRA on an 8B model, 10 to 12 GB, is less than the weights alone take in 16 bits (16.1 GB): it holds with the base in 4 bits.
Its times (4 to 6 hours for 1,000 examples and 3 epochs on a 24 GB card) are for a script that pads every example to 2,048 tokens: 6.1
million tokens, whatever the examples' length. Ratchet reads an example's own tokens only. How long that takes, `ratchet plan` says from the
runs that were recorded on the same card; neither card was measured here.

## How it counts
P are weights, of which P_l lie in the layers' matrices; L layers of width d, with an MLP of width f, query heads of width q and key heads
of width k together; V words; T tokens in a pass, T_s of them graded (5 % unless told otherwise); r the adapter's rank.

| part | bytes |
|---|---|
| weights | 2 P in bf16 (4 P in fp32 on a CPU); in 4 bits with double quantisation 0.516 P_l, and 2 for the rest |
| adapter | r · Σ(in + out) over all matrices, in 2 or 4 bytes; in 4 bytes on a base in bf16 there are copies in bf16 beside it |
| optimizer | gradients as wide as what is trained, and AdamW's two moments: 8 bytes in fp32, 2 in 8 bits, none when paged to the host |
| the same for all weights | so too; *in backward*: the largest gradient alone |
| the update of a weight in bf16 | 2 bytes for each weight of the largest matrix; 8 with `adamw` |
| activations of a layer, a token | 8 d + 4 q + 4 k + 6 f, 4 for each head, 8, and with an adapter 14 r |
| activations in all | L of these; a layer that is computed twice keeps 2 d, and one whole layer's are there beside them |
| gradients on their way, a token | 6 f + 4 d |
| logits | 10 V T_s |
| overhead | 0.6 GB for CUDA's context, on a CPU 1.1 GB for the interpreter; 5 % of all but weights; in 4 bits the largest matrix unpacked |

The activations were derived from what a Llama layer saves, and hold against what was measured on layers of Llama 3 8B's shape with saved
tensor hooks, rank 16:

| for each token and layer | counted | measured |
|---|---|---|
| adapters | 136.4 KiB | 136.4 |
| all weights | 136.1 KiB | 136.1 |
| computed twice | 8.0 KiB | 8.0 |

The libraries' own layers keep 180 KiB with adapters in bf16, 289 with adapters in fp32, and 196 where all weights are trained
(`trainers/lean_layers.py`).

A test counts a small Llama's and a small Mistral's the same way in the real training loop. On one NVIDIA H100 an 8B-shaped base with
rank 16 and passes of 4,096 tokens, as planned for 12 GB (`qlora`) and for 24 GB (`lora`), took 8.12 GB of 8.46 planned and 18.65 of 19.07
(`benchmarks/gpu.sh`; without the context and the fragments that the table counts in). `ratchet runs show` puts each run's plan beside
what it took.

## When it was wrong all the same
On a card a run tries its heaviest passes before its first step, without moving a weight. Where it finds no memory for them, or for a
later one, it halves the tokens of a pass and goes on, with the same effective batch and the same losses ([training.md](training.md)).
"""

CLI = """\
<!-- Generated from the code by `make docs`. -->

"""


def write_configuration() -> str:
    """`docs/configuration.md`: a heading for every section and every key."""
    lines = [CONFIGURATION]
    section = None
    for path, field in settings.describe():
        if path[:-1] != section:
            section = path[:-1]
            lines += [f"## {_section_title(section)}", "", _section_text(section), ""]
        lines += [f"### {_key(path)}", "", f"{field.description} {_default(field)}".strip(), ""]
    return "\n".join(lines).rstrip() + "\n"


def _section_title(section: tuple[str, ...]) -> str:
    if not section:
        return "Top level"
    return f"`[[{_key(section[:-1])}]]`" if section[-1] == "N" else f"`[{_key(section)}]`"


def _key(path: tuple[str, ...]) -> str:
    return ".".join(part for part in path if part != "N")


def _section_text(section: tuple[str, ...]) -> str:
    """The docstring of the section's model: its first line."""
    model: type[BaseModel] = settings.Settings
    for part in section:
        if part not in {"NAME", "N"}:
            model = settings.section_of(model.model_fields[part])[0] or model
    return (model.__doc__ or "").strip().splitlines()[0]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "Must be given."
    default = field.default
    if default in (None, PydanticUndefined):
        return ""
    return f"Default: `{_toml(default)}`."


def _toml(value: Any) -> str:
    """A default as it would be written in the file."""
    if isinstance(value, agents.Section):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str | Path | enum.Enum) else str(value)


def write_cli() -> str:
    """`docs/cli.md`: a heading for every command."""
    group = typer.main.get_command(cli.app)
    context = typer.Context(group, info_name="ratchet")
    return CLI + typer.cli.get_docs_for_click(obj=group, ctx=context, name="ratchet", title="The command line").strip() + "\n"


def write_schema(kind: str) -> str:
    """`docs/schemas/KIND.json`: the JSON Schema of one type of event."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": kind, **SCHEMAS[kind]}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def write_http_api() -> str:
    """`docs/http-api.md`: a heading for every route, and one for everything that is sent or answered."""
    app = create_api()
    api, roles = app.openapi(), dict(list_roles(app))
    lines = [HTTP_API, *_refusals(api), ""]
    for path, item in api["paths"].items():
        for method, operation in item.items():
            lines += [f"## `{method.upper()} {path}`", "", *_operation(operation, roles.get((method.upper(), path), ())), ""]
    lines += ["## What is sent and answered", ""]
    for name, told in sorted(api["components"]["schemas"].items()):
        if "description" in told:
            lines += [f"### {name}", "", *_schema(told), ""]
    return "\n".join(lines).rstrip() + "\n"


def create_api() -> FastAPI:
    """The application of an installation without agents."""
    with tempfile.TemporaryDirectory() as folder:
        engine = db.open_engine(f"sqlite:///{folder}/docs.db")
        schema.upgrade(engine)
        app = web.create_app(engine, settings.Settings(), {}, lambda: datetime.now(UTC), lambda: None)
        engine.dispose()
    return app


def list_roles(app: FastAPI) -> Iterator[tuple[tuple[str, str], tuple[str, ...]]]:
    """Which roles `daemon.web.access.allow` lets through on each route."""
    for route in routing.iter_route_contexts(app.routes):
        dependant = getattr(route.original_route, "dependant", None)
        for one in dependant.dependencies if dependant else ():
            found = inspect.getclosurevars(one.call).nonlocals.get("roles") if inspect.isfunction(one.call) else None
            yield from (((method, route.path or ""), found) for method in route.methods or () if found)


def _refusals(api: dict[str, Any]) -> Iterator[str]:
    """What each status of a refusal means, once for all routes."""
    meanings: dict[str, str] = {}
    for item in api["paths"].values():
        for operation in item.values():
            meanings = {status: answer["description"] for status, answer in operation["responses"].items()} | meanings
    yield from ("| status | refused because |", "|---|---|")
    yield from (f"| {status} | {meanings[status]} |" for status in sorted(meanings) if _is_refusal(status))


def _is_refusal(status: str) -> bool:
    return int(status) >= HTTPStatus.BAD_REQUEST


def _operation(operation: dict[str, Any], roles: Sequence[str]) -> Iterator[str]:
    yield operation["description"].replace("\n", " ")
    if parameters := operation.get("parameters"):
        yield from ("", "| parameter | in | type | meaning |", "|---|---|---|---|")
        for one in parameters:
            yield f"| `{one['name']}` | {one['in']} | {_type(one['schema'])} | {one.get('description', '')} |"
    if body := operation.get("requestBody"):
        yield from ("", "| body | is |", "|---|---|")
        yield from (
            f"| `{name}` | {content['schema'].get('description') or _type(content['schema'])} |"
            for name, content in body["content"].items()
        )
    yield from ("", f"- Token of: {', '.join(roles) or 'nobody, it is open'}")
    for status, answer in sorted(operation["responses"].items()):
        if not _is_refusal(status):
            yield f"- {status}: {_answer(answer)}"
    if refusals := sorted(filter(_is_refusal, operation["responses"])):
        yield f"- Refusals: {', '.join(refusals)}"


def _answer(answer: dict[str, Any]) -> str:
    kinds = [_type(content.get("schema", {})) for content in answer.get("content", {}).values()]
    meaning = answer["description"].replace("Successful Response", "").rstrip(".")
    return "; ".join(filter(None, [" or ".join(dict.fromkeys(kinds)), meaning])) or "done"


def _schema(schema: dict[str, Any]) -> Iterator[str]:
    yield schema["description"].replace("\n", " ")
    if schema.get("properties"):
        yield from ("", "| field | type | always there |", "|---|---|---|")
        for name, field in schema["properties"].items():
            yield f"| `{name}` | {_type(field)} | {'yes' if name in schema.get('required', ()) else ''} |"


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words; one that has a heading of its own by a link to it."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if several := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(map(_type, several)))
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return f"{schema.get('format') or schema.get('type', 'any')}"


@dataclass(frozen=True, slots=True)
class Model:
    """A kind of base, with the sizes that its `config.json` tells."""

    name: str
    config: dict[str, Any]


def make_config(kind: str, layers: int, width: int, inner: int, heads: int, keys: int, vocabulary: int) -> dict[str, Any]:
    """The keys of a `config.json` that the planner reads."""
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
    }


MODELS = (
    Model("7B (Mistral)", make_config("mistral", 32, 4096, 14336, 32, 8, 32000)),
    Model("8B (Llama 3)", make_config("llama", 32, 4096, 14336, 32, 8, 128256)),
    Model("13B (Llama 2)", make_config("llama", 40, 5120, 13824, 40, 40, 32000)),
    Model("14B (Qwen 2.5)", make_config("qwen2", 48, 5120, 13824, 40, 8, 152064)),
    Model("70B (Llama 3)", make_config("llama", 80, 8192, 28672, 64, 8, 128256)),
)
METHODS = (("lora", 16), ("qlora", 64), ("full", 16))
GUIDE = (
    (1, "lora", 16, 24, "8B with LoRA on an RTX 3090 (24 GB)"),
    (1, "lora", 16, 12, "8B with LoRA in 10 to 12 GB, on an RTX 3060 (12 GB)"),
    (0, "lora", 16, 12, "7B with LoRA on an RTX 3060 (12 GB)"),
    (1, "full", 16, 24, "8B, all weights, on an RTX 3090 (24 GB) with gradient checkpointing"),
    (2, "qlora", 64, 12, "13B with QLoRA, rank 64, on 12 GB"),
    (3, "qlora", 64, 12, "14B with QLoRA, rank 64, on 12 GB"),
    (3, "qlora", 64, 24, "14B with QLoRA on an RTX 3090 (24 GB)"),
    (3, "full", 16, 40, "14B, all weights, on an A100 (40 GB)"),
    (4, "qlora", 64, 48, "70B only on several cards"),
)
"""What the fine-tuning guide says: model, method, rank, GB, in words."""


def plan_for(model: Model, method: Any, rank: int, size: int) -> plan.MemoryPlan:
    """The plan with the default options on a card of so many GB."""
    options = spec.Options(method=method, lora=spec.LoraOptions(rank=rank, alpha=2 * rank))
    asked = estimates.make_method(options, "train", model.config)
    return plan.plan_memory(model.config, asked, cards.Card(f"{size} GB", "cuda", size * cards.GB))


def write_hardware() -> str:
    """`docs/hardware.md`: what fits on which card, told by the planner."""
    lines = [HARDWARE, "| model | method | " + " | ".join(f"{size} GB" for size in cards.SIZES) + " |"]
    lines.append("|---|---|" + "---|" * len(cards.SIZES))
    for model in MODELS:
        for method, rank in METHODS:
            cells = [_cell(plan_for(model, method, rank, size)) for size in cards.SIZES]
            lines.append(f"| {model.name} | `{method}`{'' if method == 'full' else f', rank {rank}'} | {' | '.join(cells)} |")
    lines += [HARDWARE_GUIDE, "| the guide says | the plan says |", "|---|---|"]
    lines += [f"| {claim} | {_judge(plan_for(MODELS[model], method, rank, size))} |" for model, method, rank, size, claim in GUIDE]
    return "\n".join(lines) + "\n" + HARDWARE_END


def _cell(planned: plan.MemoryPlan) -> str:
    settings = planned.settings
    if not planned.fits:
        return f"no ({planned.parts.total / cards.GB:.1f})"
    notes = {1: "all twice", 0: ""}.get(settings.checkpoint_every, f"1 in {settings.checkpoint_every} twice")
    is_narrow = settings.optimizer == "adamw_8bit"
    optimizer = "in backward" if settings.optimizer_in_backward else "8-bit moments" if is_narrow else ""
    precise = "bf16" if settings.adapter_dtype == "bfloat16" and not settings.is_4bit else ""
    return "; ".join(filter(None, [f"**{planned.parts.total / cards.GB:.1f}**", f"{settings.max_tokens:,}", notes, precise, optimizer]))


def _judge(planned: plan.MemoryPlan) -> str:
    said = f"{planned.parts.total / cards.GB:.1f} GB of {planned.card.name}"
    return f"fits: {_cell(planned)}" if planned.fits else f"does not fit: {said} at the least. {'; '.join(planned.remedies)}"


SCHEMAS = schemas.json_schemas() | announcements.json_schemas()
PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": write_configuration,
    "cli.md": write_cli,
    "http-api.md": write_http_api,
    "hardware.md": write_hardware,
    **{f"schemas/{kind}.json": functools.partial(write_schema, kind) for kind in SCHEMAS},
}


def main() -> None:
    """Write every page."""
    (DOCS / "schemas").mkdir(exist_ok=True)
    for name, write in PAGES.items():
        (DOCS / name).write_text(write(), encoding="utf-8")
        sys.stdout.write(f"wrote docs/{name}\n")


if __name__ == "__main__":
    main()
