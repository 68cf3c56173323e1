"""``pixart evaluate``: what a version draws, in figures with their intervals."""

from pathlib import Path
from typing import Annotated

import typer

from pixart_cluster.versions import RecipeOption, RegistryOption, RootOption, open_registry


def evaluate(
    version: Annotated[str, typer.Argument(help="A number, an alias, or an MLflow run's id.")],
    suite: Annotated[
        list[str] | None,
        typer.Option(help="digits, crowds, prompts:FILE, fidelity; default the recipe's."),
    ] = None,
    recipe: RecipeOption = "digits",
    root: RootOption = None,
    registry: RegistryOption = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: path.to.key=value.")
    ] = None,
) -> None:
    """Draw a suite's prompts with a version, judge them, and keep the figures with the version.

    With --registry the pictures and figures go below --root all the same.
    """
    from pixart_cluster.console import ConsoleMonitor
    from pixart_cluster.local import some_ray
    from pixart_cluster.recipe import read_recipe
    from pixart_jobs.evaluate import require_suites
    from pixart_jobs.pipeline import Pipeline
    from pixart_jobs.promote import find_version
    from pixart_jobs.workspace import Workspace

    settings = read_recipe(recipe, set_ or ())
    suites = require_suites(suite or settings.suites)
    models = open_registry(registry, root, settings.name)
    found = find_version(models, version)
    folder = (root or Path("runs") / "demo").absolute()
    monitor = ConsoleMonitor()
    with some_ray(folder) as scratch:
        space = Workspace.under(folder, scratch, models.uri)
        evaluations = Pipeline(settings, space, monitor).evaluate(found, suites)
    for evaluation in evaluations:
        about = f"{evaluation.suite}, basis {evaluation.basis}"
        typer.echo(f"{found.name} version {found.number}, {about}")
        for name, figure in evaluation.figures.items():
            typer.echo(f"  {name:<20} {figure}")
        for note in evaluation.notes:
            typer.echo(f"  {note}")
