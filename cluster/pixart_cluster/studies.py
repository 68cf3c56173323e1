"""``pixart ablate``: variants of a recipe at the same compute."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixart_cluster.versions import RegistryOption

if TYPE_CHECKING:
    from pixart_cluster.console import ConsoleMonitor


def ablate(
    study: Annotated[str, typer.Argument(help="A built-in study's name, or a .yaml file.")],
    root: Annotated[Path | None, typer.Option(help="Folder; default runs/STUDY.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a setting of all variants: path.to.key=value."),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    registry: RegistryOption = "",
    dry_run: Annotated[bool, typer.Option(help="Print what each run costs and exit.")] = False,
) -> None:
    """Train every variant of a study with every seed, and tell what each bought for its compute.

    Run again, it goes on. Writes study.html and study.json.
    """
    from pixart_cluster.console import ConsoleMonitor
    from pixart_cluster.local import some_ray
    from pixart_cluster.recipe import read_recipe
    from pixart_jobs import ablation
    from pixart_jobs.planner import stage_flops

    asked, runs = ablation.read_study(study, read_recipe, set_ or ())
    if dry_run:
        for run in runs:
            flops = sum(stage_flops(run.recipe, name) for name in run.recipe.stages)
            images = sum(stage.images for stage in run.recipe.stages.values())
            typer.echo(f"{run.name:<32} {flops / 1e12:10.4g} TFLOPs  {images:>9} images")
        return
    from pixart_jobs import study_report
    from pixart_jobs.workspace import Workspace
    from pixart_platform.storage import write_atomic

    folder = (root or Path("runs") / asked.name).absolute()
    with some_ray(folder) as scratch:
        space = Workspace.under(folder, scratch, registry)
        outcomes = ablation.run_study(asked, runs, space, ConsoleMonitor(), log_monitor, parallel)
    rows = study_report.summarize(asked, outcomes)
    told = study_report.as_document(asked, rows, outcomes)
    write_atomic(folder / "study.json", (json.dumps(told, indent=1) + "\n").encode())
    write_atomic(folder / "study.html", study_report.render(asked, rows, outcomes).encode())
    typer.echo(study_report.print_rows(asked, rows))
    typer.echo(f"report: {folder / 'study.html'}")


def log_monitor(path: Path) -> "ConsoleMonitor":
    """Writes what a run does to a file, line by line."""
    from rich.console import Console

    from pixart_cluster.console import ConsoleMonitor

    path.parent.mkdir(parents=True, exist_ok=True)
    return ConsoleMonitor(Console(file=path.open("a", buffering=1), soft_wrap=True, no_color=True))
