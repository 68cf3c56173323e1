"""The ``pixart`` command. User errors print one line and exit with code 2, without a traceback."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer
import yaml

from pixart_cluster import runs, versions
from pixart_cluster.doctor import doctor
from pixart_cluster.evaluations import evaluate
from pixart_cluster.local import quiet_environment
from pixart_cluster.studies import ablate
from pixart_cluster.tables import table
from pixart_cluster.versions import RegistryOption
from pixart_cluster.vote import vote

cli = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Images to a served text-to-image model, the PixArt-alpha way, on Ray.",
)  # fmt: skip
cli.add_typer(table, name="table")
cli.add_typer(versions.registry_commands, name="registry")
for command in (
    evaluate, versions.promote, versions.rollback, versions.lineage, versions.compare, vote,
    runs.submit, runs.status, runs.logs, runs.stop, doctor, ablate,
):  # fmt: skip
    cli.command()(command)
cli.command(name="list")(runs.list_)

RecipeArgument = Annotated[str, typer.Argument(help="A built-in recipe's name, or a .yaml file.")]
RootOption = Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: path.to.key=value.")
]


def _root_of(root: Path | None, name: str) -> Path:
    return (root or Path("runs") / name).absolute()


@cli.command()
def demo(
    recipe: RecipeArgument = "digits",
    root: RootOption = None,
    set_: SetOption = None,
    baseline: Annotated[
        bool, typer.Option(help="Also train with the paper's objective, and compare.")
    ] = False,
    keep: Annotated[bool, typer.Option(help="Leave the service up until Ctrl-C.")] = False,
) -> None:
    """Run the whole way on this machine: images to a served picture, with a report."""
    from pixart_cluster import demo as whole
    from pixart_cluster.console import ConsoleMonitor
    from pixart_cluster.recipe import read_recipe

    settings = read_recipe(recipe, set_ or ())
    folder = _root_of(root, "demo")
    monitor = ConsoleMonitor()

    def wait(url: str) -> None:
        monitor.console.print(f"serving on {url} - Ctrl-C to stop")
        _wait_for_interrupt()

    summary = whole.demo(
        settings, folder, monitor, with_baseline=baseline, wait=wait if keep else None
    )
    for key, value in summary.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        monitor.console.print(f"  {key:<28} {text}", markup=False)
    monitor.console.print(f"report: {folder / 'report.html'}", markup=False)
    monitor.console.print(f"next:\n{whole.next_steps(folder, settings)}", markup=False)


@cli.command()
def run(
    recipe: RecipeArgument = "digits",
    root: RootOption = None,
    set_: SetOption = None,
    registry: RegistryOption = "",
    dry_run: Annotated[bool, typer.Option(help="Print the resolved recipe and exit.")] = False,
) -> None:
    """Run a recipe's pipeline: images to an evaluated, registered model."""
    from pixart_cluster.recipe import read_recipe

    settings = read_recipe(recipe, set_ or ())
    if dry_run:
        typer.echo(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
        return
    from pixart_cluster import demo as whole
    from pixart_cluster.console import ConsoleMonitor

    monitor = ConsoleMonitor()
    folder = _root_of(root, settings.name)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped: MLflow is told, as by ^C
    result = whole.run(settings, folder, monitor, registry)
    monitor.console.print(f"{result.recipe.name} version {result.version.number}")
    monitor.console.print(f"report: {folder / 'report.html'}", markup=False)


@cli.command()
def train(
    stage: Annotated[str, typer.Argument(help="A stage of the recipe.")],
    recipe: RecipeArgument = "digits",
    root: RootOption = None,
    set_: SetOption = None,
    registry: RegistryOption = "",
) -> None:
    """Train one stage on the newest version of the stage before it, or what start_from names."""
    from pixart_cluster import demo as whole
    from pixart_cluster.console import ConsoleMonitor
    from pixart_cluster.recipe import read_recipe

    settings = read_recipe(recipe, set_ or ())
    monitor = ConsoleMonitor()
    folder = _root_of(root, settings.name)
    version = whole.train(settings, stage, folder, monitor, registry).version
    parent = version.tags["parent_version"]
    monitor.console.print(f"{version.name} version {version.number}, from {parent or 'scratch'}")


@cli.command()
def plan(
    recipe: RecipeArgument = "digits",
    gpu: Annotated[
        str, typer.Option(help="a100-80g, h100-80g, cpu, ...; default a100-80g, or cpu.")
    ] = "",
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Default train.num_workers GPUs.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    mfu: Annotated[float | None, typer.Option(min=0.001, max=1, help="Share of the peak.")] = None,
    traffic: Annotated[
        bool, typer.Option(help="Also bytes, files and memory beside the GPUs, here and at 10x.")
    ] = False,
    set_: SetOption = None,
) -> None:
    """Tell what a recipe costs, before anything starts; refuse one that cannot fit."""
    from pixart_cluster.recipe import read_recipe
    from pixart_jobs.plan_sheet import print_plan
    from pixart_jobs.planner import make_plan

    workers = [f"train.num_workers={nodes * gpus_per_node}"] if nodes else []
    settings = read_recipe(recipe, [*workers, *(set_ or ())])
    made = make_plan(settings, gpu, mfu)
    typer.echo(print_plan(made))
    if traffic:
        from pixart_jobs.traffic import print_traffic

        typer.echo(f"\n{print_traffic(made)}")


@cli.command()
def serve(
    recipe: RecipeArgument = "digits",
    root: RootOption = None,
    set_: SetOption = None,
    registry: RegistryOption = "",
) -> None:
    """Serve the model a run has registered, following its alias, until Ctrl-C."""
    from pixart_cluster.local import some_ray
    from pixart_cluster.recipe import read_recipe
    from pixart_serve import app

    settings = read_recipe(recipe, set_ or ())
    folder, uri = _root_of(root, "demo"), versions.registry_uri(registry, root)
    app.check_port(settings.serve)
    with some_ray(folder):
        url = app.start(
            settings.serve, registry_uri=uri, model_name=settings.name,
            default_steps=settings.draw.num_steps, default_guidance=settings.draw.guidance,
            default_guidance_rescale=settings.draw.guidance_rescale, jobs=folder / "jobs",
        )  # fmt: skip
        try:
            typer.echo(f"serving {settings.name}@{settings.serve.alias} on {url} - Ctrl-C to stop")
            _wait_for_interrupt()
        finally:
            app.stop()


@cli.command()
def up(
    root: RootOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="MLflow's.")] = 5000,
    ray: Annotated[bool, typer.Option(help="Without: MLflow alone, on a run's folder.")] = True,
    ray_port: Annotated[int, typer.Option(min=1, max=65535)] = 6379,
    dashboard_port: Annotated[int, typer.Option(min=1, max=65535)] = 8265,
    s3: Annotated[bool, typer.Option("--s3", help="An S3 endpoint too, kept in memory.")] = False,
    s3_port: Annotated[int, typer.Option(min=1, max=65535)] = 9000,
) -> None:
    """Bring up Ray, MLflow and dashboards on this machine alone, until Ctrl-C or `pixart down`."""
    from pixart_cluster.server import mlflow_server
    from pixart_cluster.stack import Ports, stack

    folder = _root_of(root, "demo")
    if ray:
        with stack(folder, Ports(port, ray_port, dashboard_port, s3_port), with_s3=s3) as told:
            typer.echo("\n".join([*told, "Ctrl-C to stop"]))
            _wait_for_interrupt()
        return
    versions.registry_uri("", folder)
    with mlflow_server(folder, port) as address:
        typer.echo(f"MLflow on {address} - Ctrl-C to stop")
        _wait_for_interrupt()


@cli.command()
def down(root: RootOption = None) -> None:
    """End what `pixart up` brought up, with its processes, token and sockets; runs stay."""
    from pixart_cluster import stack

    folder = _root_of(root, "demo")
    typer.echo(f"{folder}: {'down' if stack.down(folder) else 'nothing is up'}")


@cli.command()
def render(
    recipe: RecipeArgument,
    dest: Annotated[Path, typer.Argument(help="A folder, made if need be.")],
    image: Annotated[str, typer.Option(help="Container image with this package and Ray.")],
    set_: SetOption = None,
) -> None:
    """Write all a cluster is told of a recipe: Kubernetes, AWS, SLURM, MLflow, Prometheus, Grafana.

    Nothing is sent anywhere. Secrets are named, never written.
    """
    from pixart_cluster import render as manifests
    from pixart_cluster.recipe import read_recipe

    for path in manifests.write(read_recipe(recipe, set_ or ()), dest, image):
        typer.echo(path)


@cli.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A snapshot, or others' weights to make one of.")],
    dest: Annotated[Path, typer.Argument(help="A new folder; published weights: a new file.")],
    to: Annotated[
        Literal["snapshot", "pipeline", "transformer", "published"],
        typer.Option(help="What DEST becomes; the options below are for a snapshot."),
    ],
    preset: Annotated[str, typer.Option(help="The network; a published file needs it.")] = "",
    autoencoder: Annotated[str, typer.Option(help="Folder or hub id; default SOURCE.")] = "",
    text_encoder: Annotated[str, typer.Option(help="Folder or hub id; default SOURCE.")] = "",
    objective: Annotated[
        Literal["iddpm", "flow"] | None,
        typer.Option(help="How it was trained; default what SOURCE says."),
    ] = None,
    solver: Annotated[
        Literal["dpm++2m", "lcm"], typer.Option(help="How it draws; distilled weights: lcm.")
    ] = "dpm++2m",
) -> None:
    """Make a snapshot of a published file or a diffusers folder, or either of a snapshot."""
    if to != "snapshot" and (preset or autoencoder or text_encoder or objective):
        from pixart_models.convert import ConversionError

        raise ConversionError(
            f"--to {to} takes all it needs from SOURCE; leave the other options out"
        )
    with _new(dest) as place:
        from pixart_models import drawing, export, snapshot

        if to == "snapshot":
            from pixart_jobs.stage import SNAPSHOT_SCHEMA
            from pixart_platform.manifest import FileRecord, Manifest

            export.import_snapshot(
                source, place, preset, autoencoder, text_encoder, objective, solver
            )
            records = tuple(FileRecord.of(path) for path in sorted(place.iterdir()))
            Manifest(SNAPSHOT_SCHEMA, {"imported": source.name}, {}, records).commit_to(place)
        elif to == "pipeline":
            told = export.export_pipeline(drawing.load_drawer(source), place)
            typer.echo(
                f"pipeline(prompt, **{told}), with its steps, guidance and noise, draws as we do"
            )
        else:
            write = export.save_diffusers if to == "transformer" else export.save_published
            write(snapshot.load_network(source)[1], place)


@contextmanager
def _new(dest: Path) -> Iterator[Path]:
    """A place beside ``dest`` that becomes it if all goes well. Raises StorageError."""
    from pixart_platform.errors import StorageError

    if dest.exists() and (dest.is_file() or any(dest.iterdir())):
        raise StorageError(f"{dest} exists; delete it, or give another place")
    try:
        with TemporaryDirectory(prefix=".", dir=dest.absolute().parent) as beside:
            yield Path(beside) / dest.name
            os.replace(Path(beside) / dest.name, dest)
    except OSError as error:
        raise StorageError(f"{dest} cannot be written: {error}") from error


@cli.command(name="version")
def show_version() -> None:
    """Print the version."""
    typer.echo(version("pixart-ray"))


def _wait_for_interrupt() -> None:
    """Block until SIGINT or SIGTERM."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    while not stopped.wait(0.5):
        pass


def _user_error(error: BaseException) -> str | None:
    """The message of an error a user can mend, also when Ray has wrapped it; None for others."""
    from pixart_models.config import ModelInputError
    from pixart_platform.errors import PixartError

    seen: set[int] = set()
    cause: Any = error
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, PixartError | ModelInputError):
            told = str(cause.args[0] if cause.args else cause)
            return told.partition("\nFailed to apply UDF")[0]  # Ray Data's own words after ours
        seen.add(id(cause))
        cause = getattr(cause, "cause", None) or cause.__cause__
    return None


def main() -> None:
    """Entry point of the ``pixart`` script."""
    quiet_environment()
    try:
        cli()
    except Exception as error:  # the process boundary: everything else keeps its traceback
        message = _user_error(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
