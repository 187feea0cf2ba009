"""`ratchet labels`: where experts disagree, and how that is settled."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from daemon.cli import context

app = typer.Typer(help="Find answers that contradict each other, and settle them.", no_args_is_help=True)


class NoConflictError(LookupError):
    """There is no open conflict that this names, or more than one."""


class LabelRefusedError(ValueError):
    """The answer can't be taken."""


@app.command()
def conflicts(agent: context.AnyAgent = None, config: context.ConfigFile = context.CONFIG_FILE, as_json: context.AsJson = False) -> None:
    """Print the cases whose experts disagree; they stay out of datasets until a third read or `resolve` settles them."""
    with context.opened(config) as opened, opened.reading() as connection:
        rows = _list_conflicts(connection, opened.filter_agent(agent))
    context.print_rows(rows, as_json=as_json, nothing="Nobody disagrees.")


@app.command()
def resolve(
    case: Annotated[str, typer.Argument(metavar="CLAIM", help="The claim id; the prediction id where a claim has several conflicts.")],
    answer: Annotated[str, typer.Option("--answer", help="What is right: one of the agent's labels.")],
    expert: Annotated[str, typer.Option("--expert", help="Who says so: the name of an operator's token.")],
    rationale: Annotated[str | None, typer.Option("--rationale", help="Why; the model learns it too.")] = None,
    agent: context.AgentName = None,
    config: context.ConfigFile = context.CONFIG_FILE,
) -> None:
    """Settle a conflict by an adjudication: the same label event that everybody sends, through the same door."""
    from consumers import delivery, handlers, schemas  # noqa: PLC0415 — `ratchet --help` needs none of it
    from daemon import policies  # noqa: PLC0415
    from storage import events, tokens  # noqa: PLC0415

    with context.opened(config) as opened, opened.writing() as connection:
        chosen, now = opened.pick_agent(agent), context.read_clock()
        prediction = _find_conflict(_list_conflicts(connection, chosen.name), case)["prediction_id"]
        data = {"agent": chosen.name, "prediction_id": prediction, "answer": answer, "kind": "adjudication", "answered_at": now.isoformat()}
        body = _to_event({**data, "expert": expert, **({"rationale": rationale} if rationale else {})})
        principal = tokens.read(connection, expert)
        if principal is None or principal.role != "operator":
            operators = [row["name"] for row in tokens.list_all(connection) if row["role"] == "operator" and row["revoked_at"] is None]
            known = f"one of {', '.join(operators)}" if operators else "an operator, whom `ratchet tokens add NAME --role operator` makes"
            raise LabelRefusedError(f"--expert is {expert!r}: a conflict is settled by {known}")
        items = schemas.parse(body, schemas.LABEL)
        delivered = delivery.deliver(connection, items, {chosen.name: chosen.labels}, principal, now)[0]
        if delivered.ulid is None or delivered.refusal is not None:
            raise LabelRefusedError(str(delivered.refusal))
        agents = policies.read_in_force(connection, opened.settings.agents, now)
        handlers.handle_batch(connection, events.read_unhandled(connection, [delivered.ulid]), agents, now)
        state = events.read(connection, delivered.ulid)
    if state is None or state.state != "handled":
        raise LabelRefusedError(f"the answer is stored, but not applied: {state and state.reason}")
    typer.echo(f"{case} is {answer}, says {expert}.")


def _list_conflicts(connection: Any, agent: str | None) -> list[dict[str, Any]]:
    from storage import labels, predictions  # noqa: PLC0415 — `ratchet --help` needs none of it

    rows = []
    for prediction, answers in labels.list_conflicts(connection, agent):
        case = predictions.read(connection, prediction)
        if case is not None:
            said = {one.expert: one.answer for one in answers if one.kind in labels.READS}
            rows.append({**{name: case[name] for name in ("agent", "claim_id", "prediction_id")}, "answers": said})
    return rows


def _find_conflict(rows: list[dict[str, Any]], case: str) -> dict[str, Any]:
    found = [row for row in rows if case in {row["claim_id"], row["prediction_id"]}]
    if not found:
        raise NoConflictError(f"{case!r} has no open conflict: `ratchet labels conflicts` shows them")
    if len(found) > 1:
        raise NoConflictError(f"{case!r} has several conflicts: name a prediction, {', '.join(row['prediction_id'] for row in found)}")
    return found[0]


def _to_event(data: dict[str, Any]) -> bytes:
    import orjson  # noqa: PLC0415 — `ratchet --help` needs none of it

    from consumers import schemas  # noqa: PLC0415

    key = f"{data['prediction_id']}/{data['answered_at']}"
    return orjson.dumps([{"specversion": "1.0", "type": schemas.LABEL, "source": "ratchet-cli", "id": key, "data": data}])
