"""`ratchet simulate`: what the loop would have done with months of labelled history."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daemon.cli import context

RULES = ("posterior", "anytime")
TINY = "tiny"


def simulate(
    history: Annotated[Path, typer.Option(exists=True, dir_okay=False, readable=True, help="Labelled cases from before, as JSON lines.")],
    stream: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, readable=True, help="Labelled cases that come in one by one, as JSON lines.")
    ],
    out: Annotated[Path, typer.Option(help="The folder of this replay; one that was interrupted goes on.")],
    base: Annotated[str, typer.Option(help="A checkpoint folder, or `tiny` to make a small one from the history's texts.")] = TINY,
    budget: Annotated[float, typer.Option(min=0.001, max=1, help="Share of the claims that experts answer.")] = 0.1,
    retrain_every: Annotated[int, typer.Option(min=1, help="New answers that start a training run.")] = 75,
    rule: Annotated[str, typer.Option(help="`posterior` or `anytime`.")] = "posterior",
    seed: Annotated[int, typer.Option(help="Of the base, the training and the baselines.")] = 1,
    baselines: Annotated[bool, typer.Option("--baselines", help="Also frozen, ungated and random, on the same stream.")] = False,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Take the agent from this configuration.")] = None,
    agent: Annotated[str | None, typer.Option(help="Which agent of the configuration.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A training option or `warm_start`; may be repeated.")
    ] = None,
) -> None:
    """Replay labelled history through the whole loop on a simulated clock; `OUT/report.json` and `OUT/report.html` say what came of it.

    A line is {"claim_id", "group", "occurred_at", "input": {…}, "attributes": {…}, "answer"}. An answer of the stream is looked at only
    when the loop asks for it. Without --config the agent is made from the history: the labels that occur, and a prompt with all fields.
    """
    if rule not in RULES:
        raise typer.BadParameter(f"{rule!r} is no rule: use {' or '.join(RULES)}", param_hint="--rule")
    if base != TINY and not (Path(base) / "config.json").is_file():
        raise typer.BadParameter(f"{base} holds no config.json: name the folder of a Hugging Face checkpoint, or tiny", param_hint="--base")
    overrides = context.read_overrides(options)
    from rich import progress  # noqa: PLC0415 — `ratchet --help` needs none of it

    from daemon import rehearsal, training  # noqa: PLC0415

    asked = rehearsal.Asked(history, stream, out, base, budget, retrain_every, rule, seed, baselines, config, agent, overrides)
    with progress.Progress(*progress.Progress.get_default_columns(), progress.TimeElapsedColumn(), transient=False) as bar:
        task = bar.add_task("windows", total=None)
        try:
            report = rehearsal.run(
                asked, lambda stage: bar.update(task, description=stage), lambda n, of: bar.update(task, completed=n, total=of)
            )
        except training.OptionsRefusedError as error:
            raise typer.BadParameter(str(error), param_hint="--set") from error
    typer.echo(f"accuracy {report['accuracy']:.3f} with {report['labels_used']} answers ({report['label_share']:.1%} of the claims)")
    typer.echo(f"{report['promotions']} promoted, {report['rejections']} rejected, {report['inconclusive']} inconclusive")
    if baselines:
        gain = report["gain_over_frozen"]
        names = ", ".join(f"{name} {report[f'{name}_accuracy']:.3f}" for name in ("frozen", "ungated", "random"))
        typer.echo(f"{names}; gain over frozen {gain['estimate']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})")
    typer.echo(f"{out / 'report.json'} and {out / 'report.html'} are written.")
