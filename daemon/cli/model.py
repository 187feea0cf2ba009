"""`ratchet model`: small base models for laptops, tests and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make small base models.", no_args_is_help=True)

Texts = Annotated[
    Path,
    typer.Option(exists=True, dir_okay=False, readable=True, help='JSON lines, each {"text": "…"}: prompts without answers.'),
]


@app.command()
def tiny(
    texts: Texts,
    out: Annotated[Path, typer.Option(help="The checkpoint folder to write; it must not exist.")],
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the texts.")] = 1,
) -> None:
    """Make a Llama-type base of about 1 M parameters from nothing but texts, as an ordinary Hugging Face checkpoint."""
    import subprocess  # noqa: PLC0415 — `ratchet --help` needs none of it
    import sys  # noqa: PLC0415

    command = [sys.executable, "-m", "trainers.tiny", "--texts", str(texts), "--out", str(out), "--seed", str(seed)]
    raise typer.Exit(subprocess.run(command, check=False).returncode)  # noqa: S603  our own interpreter and module
