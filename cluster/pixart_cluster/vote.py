"""``pixart vote``: two versions, side by side and blind, on a page of this machine."""

import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixart_cluster.versions import RegistryOption, RootOption, open_registry

if TYPE_CHECKING:
    from pixart_jobs.votes import Booth

_QUIET_SECONDS = 10.0  # after the last vote, in which it may still be undone


def vote(
    a: Annotated[str, typer.Argument(metavar="A", help="A version, an alias or a run's id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another, also MODEL@VERSION.")],
    recipe: Annotated[str, typer.Option(help="Whose model, prompts and settings.")] = "digits",
    root: RootOption = None,
    registry: RegistryOption = "",
    prompts: Annotated[Path | None, typer.Option(help="A file with one prompt a line.")] = None,
    num: Annotated[int, typer.Option(min=1, max=1000, help="Pairs at most.")] = 50,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any.")] = 8010,
    voter: Annotated[str, typer.Option(help="Who votes; default you.")] = "",
) -> None:
    """Have people say, blind, which of two versions draws better; MLflow keeps every vote."""
    from pixart_cluster.console import ConsoleMonitor
    from pixart_cluster.recipe import read_recipe
    from pixart_jobs import preference, votes
    from pixart_jobs.compare import resolve
    from pixart_jobs.moves import whoever
    from pixart_serve import ballot

    settings, who = read_recipe(recipe), voter or whoever()
    votes.check_voter(who)
    models = open_registry(registry, root, settings.name)
    first, second = (resolve(models.uri, models.name, reference)[1] for reference in (a, b))
    texts = preference.choose_prompts(settings, prompts, num)
    folder = (root or Path("runs") / "demo").absolute()
    poll = preference.Poll(first, second, texts, settings.draw, settings.seed, folder)
    listener, monitor = ballot.claim_port(port), ConsoleMonitor()
    with listener:
        with monitor.job("vote", 2 * len(texts), "pictures") as job:
            pictures = preference.draw(poll, settings.evaluate.batch_images, job.reach)
        file = votes.VoteFile(poll.folder / votes.VOTES_FILE)
        recorder = votes.Recorder(models.uri, poll, file)
        booth = votes.Booth(poll, pictures, file, recorder.notice)
        if booth.ballot(who)["pair"]:
            with ballot.shown(ballot.build_ballot(booth, who), listener) as url:
                typer.echo(f"{who} votes on {url} (others: {url}?voter=NAME) - Ctrl-C to end")
                _wait(booth)
        else:
            typer.echo(f"{who} has voted on all pairs; others may: --voter NAME")
    for line in votes.tell(poll, votes.count(poll, votes.settle(file.read()))):
        typer.echo(line)
    typer.echo(f"votes: {file.path}, run {recorder.run_id}")
    if not recorder.close():
        typer.echo("MLflow does not answer; give the same command again to send it the votes")


def _wait(booth: "Booth") -> None:
    """Until SIGINT, SIGTERM, or all have been through for a while."""
    stopped = threading.Event()
    since: float | None = None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    while not stopped.wait(0.5):
        now = time.monotonic()
        since = (since or now) if booth.is_through else None
        if since is not None and now - since >= _QUIET_SECONDS:
            return
