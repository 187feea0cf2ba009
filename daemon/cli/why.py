"""`ratchet why`: who and what decided a claim, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli import context, versions

if TYPE_CHECKING:
    from sqlalchemy import Connection

MADE = ("name", "verdict", "is_forced", "parent", "dataset", "run", "base_digest", "adapter_digest", "prompt_digest", "created_at")
CHANGE = ("kind", "version", "previous", "actor", "reason", "state", "requested_at", "confirmed_at")
LABEL = ("expert", "kind", "answer", "answered_at", "seconds_spent", "superseded_by", "dataset")
PREDICTION = ("prediction_id", "origin", "occurred_at", "decision", "confidence", "model_version", "received_at")


class UnknownClaimError(LookupError):
    """Nobody ever predicted or imported this claim."""


def why(
    claim: Annotated[str, typer.Argument(metavar="CLAIM", help="The claim's id.")],
    agent: context.AnyAgent = None,
    config: context.ConfigFile = context.CONFIG_FILE,
    as_json: context.AsJson = False,
) -> None:
    """Print which version, threshold, dataset and expert decided a claim, why it was reviewed, and who was in production then."""
    from storage import predictions  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.reading() as connection:
        found = predictions.of_claim(connection, claim, opened.filter_agent(agent))
        items = [_explain(connection, dict(prediction)) for prediction in found]
    if not items:
        raise UnknownClaimError(f"no prediction and no imported case has the claim id {claim!r}")
    if as_json:
        context.print_json({"claim": claim, "predictions": items})
        return
    for item in items:
        typer.echo(f"{claim}, {item['prediction_id']} of {item['agent']}")
        for line in versions.outline({name: value for name, value in item.items() if name not in {"agent", "prediction_id"}}, 1):
            typer.echo(line)


def _explain(connection: Connection, prediction: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is known about how one prediction came about and what became of it."""
    from storage import labels, ledger, registry, reviews  # noqa: PLC0415 — `ratchet --help` needs none of it

    agent, at = prediction["agent"], prediction["occurred_at"]
    made_by = registry.find(connection, agent, prediction["model_version"] or "")
    answers = labels.of_predictions(connection, [prediction["id"]]).get(prediction["id"], [])
    truth = labels.settle(answers)
    deployment = registry.deployment_at(connection, agent, at)
    given = [row for row in labels.of_claim(connection, prediction["claim_id"], agent) if row["prediction"] == prediction["id"]]
    return {
        "agent": agent,
        **_pick(prediction, PREDICTION),
        "version": made_by and {**_pick(made_by, MADE), "trained_on": _describe_dataset(connection, agent, made_by["dataset"])},
        "in_service_then": deployment and _pick(deployment, CHANGE),
        "routing": _describe_routing(connection, prediction),
        "reviews": [
            {**row, "steps": [dict(step) for step in reviews.history(connection, row["id"])]}
            for row in map(dict, reviews.of_prediction(connection, prediction["id"]))
        ],
        "labels": [{**_pick(row, LABEL), "in_service_then": registry.champion_at(connection, agent, row["answered_at"])} for row in given],
        "truth": truth and {"answer": truth.answer, "kind": truth.kind, "expert": _expert_of(answers, truth.label_id)},
        "is_conflict": labels.is_conflict(answers),
        "ledger_entries": [entry["seq"] for entry in ledger.of_claim(connection, agent, prediction["claim_id"])],
    }


def _describe_routing(connection: Connection, prediction: Mapping[str, Any]) -> dict[str, Any]:
    from storage import policies  # noqa: PLC0415 — `ratchet --help` needs none of it

    shown = ("policy_version", "effective_threshold", "reasons", "priority", "inclusion_probability")
    number = prediction["policy_version"]
    policy = policies.show(connection, prediction["agent"], number) if number is not None else None
    return {**{name: prediction[name] for name in shown}, "policy": policy and {"digest": policy["digest"], **policy["body"]}}


def _describe_dataset(connection: Connection, agent: str, number: int | None) -> dict[str, Any] | None:
    from storage import datasets  # noqa: PLC0415 — `ratchet --help` needs none of it

    if number is None:
        return None
    return _pick(datasets.read(connection, agent, number), ("number", "root", "rows", "created_at"))


def _expert_of(answers: Any, label_id: str) -> str:
    return next(str(answer.expert) for answer in answers if answer.label_id == label_id)


def _pick(row: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: row[name] for name in names}
