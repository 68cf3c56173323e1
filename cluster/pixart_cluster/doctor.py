"""``pixart doctor``: is all here that a recipe needs, and if not, what to do.

Checks run at once, each on a thread; one that does not end in time is named and left. Exit code 2
if anything is wrong.
"""

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pixart_cluster.machine_checks import Finding
from pixart_cluster.versions import RegistryOption

_SECONDS, _SHARED_SECONDS = 30.0, 75.0  # for all of a check's questions; the second runs a Ray job
Check = Callable[[], Iterator[Finding]]


def doctor(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe's name, or a .yaml file.")] = (
        "digits"
    ),
    root: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a setting.")] = None,
    registry: RegistryOption = "",
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="A cluster's http://HEAD:8265.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check machine, S3, MLflow and Ray for a recipe; each with a verdict and what to do."""
    with _impatient():
        findings = gather(make_checks(recipe, root, set_ or (), registry, address))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print(findings)
    if any(finding.verdict == "wrong" for finding in findings):
        raise typer.Exit(2)


@contextmanager
def _impatient() -> Iterator[None]:
    """MLflow's client asks twice, for 5 seconds, unless it was told otherwise."""
    ours = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    ours = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def make_checks(
    name: str, root: Path | None, overrides: Iterable[str], registry: str, address: str
) -> dict[str, Check]:
    """The checks of a recipe, by name. Raises RecipeError, and PlanError if it cannot fit."""
    from pixart_cluster import machine_checks as machine
    from pixart_cluster import service_checks as services
    from pixart_cluster.recipe import read_recipe
    from pixart_jobs.planner import make_plan

    recipe = read_recipe(name, overrides)
    plan = make_plan(recipe)
    folder = (root or Path("runs") / recipe.name).absolute()
    ports = {"Ray's dashboard": 8265, "MLflow": 5000, "the service": recipe.serve.port}
    ours = {port for port in ports.values() if f":{port}" in f"{registry} {address}"}
    shared = root.absolute() if root else None
    here: dict[str, Check] = {
        "memory": partial(machine.check_memory, recipe, plan),
        "disks": partial(machine.check_disks, recipe, plan, folder),
    }
    return {
        "versions": machine.check_versions,
        "gpus": partial(machine.check_gpus, recipe, elsewhere=bool(address)),
        **({} if address else here),  # the work would be done there
        "files": machine.check_files,
        "ports": partial(
            machine.check_ports, {k: port for k, port in ports.items() if port not in ours}
        ),
        "mlflow": partial(services.check_mlflow, registry, folder, recipe.name),
        "ray": partial(services.check_ray, address, recipe, shared),
        **{
            place: partial(services.check_s3, place, writes=writes)
            for place, writes in services.places_of(recipe).items()
        },
    }


def gather(checks: Mapping[str, Check], seconds: float = 0.0) -> list[Finding]:
    """What all checks find, in their order; ``seconds`` to wait for one, if not the usual."""
    found: dict[str, queue.SimpleQueue[Finding | None]] = {}
    for name, check in checks.items():
        found[name] = queue.SimpleQueue()
        threading.Thread(target=_run, args=(name, check, found[name]), daemon=True).start()
    began, findings = time.monotonic(), list[Finding]()
    for name, told in found.items():
        limit = began + (seconds or (_SHARED_SECONDS if name == "ray" else _SECONDS))
        try:
            while finding := told.get(timeout=max(limit - time.monotonic(), 0.01)):
                findings.append(finding)
        except queue.Empty:
            told_so = f"no end after {limit - began:.0f} s"
            findings.append(Finding(name, "wrong", told_so, "see whether its server is overloaded"))
    return findings


def _run(name: str, check: Check, found: "queue.SimpleQueue[Finding | None]") -> None:
    try:
        for finding in check():
            found.put(finding)
    except Exception as error:  # one check that breaks must not hide the others
        told = f"the check itself failed: {type(error).__name__}: {error}".splitlines()[0]
        found.put(Finding(name, "wrong", told, "report it with this line"))
    found.put(None)


def _print(findings: list[Finding]) -> None:
    width = min(max(len(finding.check) for finding in findings), 32)
    for finding in findings:
        typer.echo(f"{finding.verdict:<8} {finding.check:<{width}}  {finding.seen}")
        if finding.remedy:
            typer.echo(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
