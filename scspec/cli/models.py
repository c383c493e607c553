"""`scspec models`: which models are on this machine, fetch one, verify what is here."""

import json
from pathlib import Path
from typing import Annotated

import typer

from scspec.cli.plain import PLAIN

app = typer.Typer(**PLAIN, help="The models on this machine: list, fetch, verify.")


@app.command("list")
def list_models() -> None:
    """List the aliases and what the hub's cache has, and where."""
    from scspec.inventory import models_here

    for model in models_here():
        where = f"{model.size_bytes / 1e9:.2f} GB in {model.folder}" if model.folder else "not here"
        print(f"{model.name}: {where} ({model.note})")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="An alias, a local folder, or a Hugging Face id.", show_default=False)],
    manifest: Annotated[
        Path | None, typer.Option(help="Where to write what was fetched, as JSON.", show_default="print it")
    ] = None,
) -> None:
    """Fetch a model's files, check and convert them."""
    from scspec.models import fetch_model
    from scspec.results import atomic_file

    if manifest:
        manifest.parent.mkdir(parents=True, exist_ok=True)  # before gigabytes are fetched that it is to tell of
    text = json.dumps(fetch_model(name), indent=2, sort_keys=True) + "\n"
    if manifest is None:
        print(text, end="")
        return
    with atomic_file(manifest) as file:
        file.write(text.encode())


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="A model.", show_default="all that are here")] = None,
    manifests: Annotated[Path, typer.Option(help="The folder of manifests that fetch has written.")] = Path(
        "results/models"
    ),
) -> None:
    """Compare the hashes of files that are here with pins and manifests; exit code 1 if one is another."""
    from scspec.inventory import verifiable, verify

    wrong, models = 0, [name] if name else verifiable(manifests)
    if not models:
        print("no model is on this machine; fetch one: scspec models fetch NAME")
    for model in models:
        for verdict in verify(model, manifests):
            state, says = ("WRONG", verdict.fault) if verdict.fault else ("ok", f"as {verdict.against} has it")
            print(f"{state:5} {verdict.file}: {says}", flush=True)
            wrong += bool(verdict.fault)
    raise typer.Exit(1 if wrong else 0)
