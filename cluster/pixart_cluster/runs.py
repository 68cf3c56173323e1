"""``pixart submit``, ``status``, ``logs``, ``stop`` and ``list``: pipelines on a cluster."""

from typing import Annotated

import typer

from pixart_cluster.versions import RegistryOption
from pixart_platform.tracking import hide_password

AddressOption = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS", show_default=False,
        help="Ray's dashboard, http://HEAD:8265.",
    ),
]  # fmt: skip
RunArgument = Annotated[str, typer.Argument(help="A run's name: its recipe's.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]


def submit(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe's name, or a .yaml file.")],
    runs: Annotated[
        str,
        typer.Option(
            envvar="PIXART_RUNS", show_default=False,
            help="Folder that all nodes share; the run's is RUNS/NAME.",
        ),
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: path.to.key=value.")
    ] = None,
    registry: RegistryOption = "",
    address: AddressOption = "",
    driver_on: Annotated[
        list[str] | None, typer.Option(help="Label of the driver's node: key=value; default head.")
    ] = None,
    ship_code: Annotated[
        bool, typer.Option(help="Send this checkout's packages along, for development.")
    ] = False,
    follow: Annotated[bool, typer.Option(help="Show its log until it has ended.")] = True,
    retries: Annotated[
        int, typer.Option(min=0, help="Submit again so often when the driver's node is lost.")
    ] = 3,
) -> None:  # fmt: skip
    """Run a recipe's pipeline on a cluster; again: follow it, or go on where it ended."""
    from pixart_cluster.recipe import read_recipe
    from pixart_cluster.submit import Cluster, Order, run_to_end

    settings = read_recipe(recipe, set_ or ())
    labels = dict(_pair(text) for text in driver_on or ())
    order = Order(
        settings, f"{runs.rstrip('/')}/{settings.name}", registry, labels, ship_code
    )  # fmt: skip
    cluster = Cluster(address)
    if not follow:
        attempt, is_new = cluster.submit(order)
        typer.echo(f"{attempt.id}: {'submitted' if is_new else 'is under way already'}")
        return
    try:
        for text in run_to_end(cluster, order, retries):
            typer.echo(text, nl=False)
    except KeyboardInterrupt:
        typer.echo(f"\nit goes on without us: pixart status {settings.name}, or logs, or stop")
        return
    typer.echo(f"{settings.name}: done")


def status(run: RunArgument, address: AddressOption = "", json_: JsonOption = False) -> None:
    """What a run is doing, or how it ended."""
    from pixart_cluster.submit import Cluster, as_json

    cluster = Cluster(address)
    attempt = cluster.latest(run)
    line = cluster.last_line(attempt)
    typer.echo(as_json(attempt, line) if json_ else f"{run}: {attempt.describe(line)}")


def logs(
    run: RunArgument,
    address: AddressOption = "",
    attempt: Annotated[int, typer.Option(help="Which; default the last.", min=0)] = 0,
    follow: Annotated[bool, typer.Option(help="Until it has ended.")] = False,
) -> None:
    """What a run's driver has said."""
    from pixart_cluster.submit import Cluster, ClusterError

    cluster = Cluster(address)
    found = cluster.latest(run)
    if attempt:
        of_run = {a.number: a for a in cluster.attempts(run)}
        if attempt not in of_run:
            raise ClusterError(
                f"--attempt {attempt}: run {run!r} has {', '.join(map(str, of_run))}"
            )
        found = of_run[attempt]
    if follow:
        for text in cluster.follow(found):
            typer.echo(text, nl=False)
    else:
        typer.echo(cluster.logs(found), nl=False)


def stop(run: RunArgument, address: AddressOption = "") -> None:
    """Stop a run; what is done stays, and to submit it again is to go on."""
    from pixart_cluster.submit import Cluster

    typer.echo(f"{run}: {Cluster(address).stop(run).describe()}")


def list_(address: AddressOption = "", json_: JsonOption = False) -> None:
    """All runs of a cluster, each with its last attempt."""
    from pixart_cluster.submit import Cluster, as_json

    cluster = Cluster(address)
    latest = {attempt.run: attempt for attempt in cluster.attempts()}
    for run, attempt in sorted(latest.items()):
        typer.echo(as_json(attempt) if json_ else f"{run}: {attempt.describe()}")
    if not latest and not json_:
        typer.echo(f"no run was submitted to {hide_password(cluster.address)}")


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r} is not key=value", param_hint="--driver-on")
    return key, value
