"""``pixart promote``, ``rollback``, ``lineage``, ``compare`` and ``registry prune``: which version
draws for services, whence it is, how well it does, and which are no longer needed."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pixart_platform.errors import StorageError
from pixart_platform.tracking import sqlite_uri

if TYPE_CHECKING:
    from pixart_platform.registry import Registry

RecipeOption = Annotated[str, typer.Option(help="Whose model, and whose gates.")]
RootOption = Annotated[Path | None, typer.Option(help="Folder of the run; default runs/demo.")]
RegistryOption = Annotated[
    str,
    typer.Option(
        envvar="MLFLOW_TRACKING_URI", show_default=False,
        help="MLflow's address instead of the run's folder.",
    ),
]  # fmt: skip
WhyOption = Annotated[str, typer.Option(help="Kept with the move, and who made it.")]

registry_commands = typer.Typer(no_args_is_help=True, help="Look after the registered versions.")


def promote(
    version: Annotated[str, typer.Argument(help="A number or an alias.")],
    to: Annotated[Literal["champion", "challenger"], typer.Option()] = "champion",
    recipe: RecipeOption = "digits",
    root: RootOption = None,
    registry: RegistryOption = "",
    why: WhyOption = "",
) -> None:
    """Let services draw with a version, if it passes the recipe's gates and draws at all."""
    from pixart_cluster.recipe import read_recipe
    from pixart_jobs import promote as job

    settings = read_recipe(recipe)
    models = open_registry(registry, root, settings.name)
    found = models.get(version)
    job.promote(settings, models, found, alias=to, why=why)
    typer.echo(f"{found.name} version {found.number} is {to}")


def rollback(
    recipe: RecipeOption = "digits",
    root: RootOption = None,
    registry: RegistryOption = "",
    why: WhyOption = "",
) -> None:
    """Let services draw with what was champion before."""
    from pixart_jobs import promote as job

    found = job.roll_back(open_registry(registry, root, _model_of(recipe)), why)
    typer.echo(f"{found.name} version {found.number} is champion again")


def lineage(
    version: Annotated[str, typer.Argument(help="A number or an alias.")],
    recipe: RecipeOption = "digits",
    root: RootOption = None,
    registry: RegistryOption = "",
) -> None:
    """Tell what a version was made from, back to tables and recipe, and who let it draw when."""
    from pixart_jobs import promote as job
    from pixart_jobs.moves import history

    models = open_registry(registry, root, _model_of(recipe))
    moves = history(models)
    for found in job.lineage(models, models.get(version)):
        typer.echo(f"{found.name} version {found.number}, stage {found.tags.get('stage', '')}")
        recipe_digest, digest = found.tags.get("recipe_digest", ""), found.tags.get("digest", "")
        made_from = {f"from {kind}": told for kind, told in job.inputs_of(found).items()}
        about = {"recipe": recipe_digest, "run": found.run_id, "snapshot": digest}
        for key, value in (about | {"folder": found.source} | made_from).items():
            typer.echo(f"  {key:<18} {value}")
        for key, told in sorted(job.measured(found).items()):
            typer.echo(f"  {key:<18} {told.figure}, suite {told.suite}")
        for move in moves:
            if move.after == found.number:
                moment = datetime.fromtimestamp(move.at, UTC).isoformat(" ", "seconds")
                before = f" (before: version {move.before})" if move.before else ""
                typer.echo(f"  {move.alias} {moment} by {move.who}{before}: {move.why}")


def compare(
    references: Annotated[
        list[str], typer.Argument(metavar="A B [C...]", help="Versions, aliases or run ids.")
    ],
    recipe: RecipeOption = "digits",
    root: RootOption = None,
    registry: RegistryOption = "",
    out: Annotated[Path | None, typer.Option(help="Folder of the page; default: here.")] = None,
) -> None:
    """Tell whether versions differ, and write it as one page; MLflow keeps a copy."""
    from pixart_jobs import compare as job
    from pixart_jobs.compare_page import render
    from pixart_platform.storage import write_atomic
    from pixart_platform.tracking import Tracker

    models = open_registry(registry, root, _model_of(recipe))
    found = job.compare(models.uri, models.name, references)
    labels = [side.label for side in found.sides]
    folder = (out or Path()).absolute()
    page, numbers = folder / "comparison.html", folder / "comparison.json"
    write_atomic(page, render(found).encode())
    write_atomic(numbers, json.dumps(found.as_document(), indent=1).encode())
    identity, name = f"compare:{','.join(labels)}", f"compare {' '.join(labels)}"
    tracker = Tracker.start(models.uri, models.name, identity, name, artifacts=folder)
    job.record(found, tracker, [page, numbers])
    for finding in found.findings:
        told = f"{labels[finding.side]} against {labels[0]}: {finding.metric} {finding}"
        typer.echo(told)
    if not found.findings:
        typer.echo("nothing measured on both; run pixart evaluate on each")
    typer.echo(page)


@registry_commands.callback()
def _registry_commands() -> None:
    """Look after the registered versions."""


@registry_commands.command()
def prune(
    keep: Annotated[int, typer.Option(help="Newest versions of each stage that stay.")] = 3,
    older_than: Annotated[float, typer.Option(help="Only what is older than so many days.")] = 0.0,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; else only tell.")] = False,
    recipe: RecipeOption = "digits",
    root: RootOption = None,
    registry: RegistryOption = "",
) -> None:
    """Forget old versions, and delete their snapshots.

    Never what an alias names, what a pipeline under way builds on, nor what these came from.
    """
    from pixart_jobs import prune as job

    policy = job.Policy(keep, older_than)
    models = open_registry(registry, root, _model_of(recipe))
    num_bytes = count = 0
    for gone in job.prune(models, policy, really=yes):
        version, stays = gone.version, f" (its bytes stay: {gone.note})" if gone.note else ""
        typer.echo(
            f"{'deleted' if yes else 'would delete'} {version.name} version {version.number}, "
            f"stage {version.tags.get('stage') or '-'}, {gone.num_bytes:,} bytes in "
            f"{version.source}{stays}"
        )
        num_bytes, count = num_bytes + gone.num_bytes, count + 1
    hint = "" if yes or not count else "; --yes deletes them"
    typer.echo(f"{count} versions, {num_bytes:,} bytes{hint}")


def registry_uri(uri: str, root: Path | None) -> str:
    """MLflow's address, or that of the run in ``root``. Raises StorageError if there is none."""
    if uri:
        return uri
    folder = (root or Path("runs") / "demo").absolute()
    if not (folder / "mlflow.db").is_file():
        raise StorageError(f"--root {folder}: no run here (no mlflow.db); make one with pixart run")
    return sqlite_uri(folder)


def open_registry(uri: str, root: Path | None, name: str) -> "Registry":
    """Raises StorageError for a folder without a run, RegistryError."""
    from pixart_platform.registry import Registry

    return Registry(registry_uri(uri, root), name)


def _model_of(recipe: str) -> str:
    """The name under which its versions are registered."""
    from pixart_cluster.recipe import read_recipe

    return read_recipe(recipe).name
