"""Progress on a terminal: one bar a job while it runs, one line when it is done.

Where there is no terminal (CI, the log of a Ray job) lines tell the time and, twice a minute, how
far a job is.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_TELL_SECONDS = 30.0


@dataclass(frozen=True)
class _Bar:
    progress: Progress
    task: int

    def reach(self, done: int) -> None:
        self.progress.update(self.task, completed=done)  # type: ignore[arg-type]


class _Lines:
    """A line now and then."""

    def __init__(self, console: Console, name: str, total: int, unit: str) -> None:
        self._console, self._job = console, (name, total, unit)
        self._told_at = time.monotonic()

    def reach(self, done: int) -> None:
        if time.monotonic() >= self._told_at + _TELL_SECONDS:
            self._told_at = time.monotonic()
            name, total, unit = self._job
            self._console.print(f"{_now()}{'':<4} {name:<10} {done} of {total} {unit}")


class ConsoleMonitor:
    """Shows a pipeline's jobs with rich."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    @contextmanager
    def job(self, name: str, total: int, unit: str) -> Iterator[_Bar | _Lines]:
        started = time.monotonic()
        if not self.console.is_terminal:
            self.console.print(f"{_now()}{'':<4} {name:<10} 0 of {total} {unit}")
            yield _Lines(self.console, name, total, unit)
            self._print_done(name, total, unit, started)
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn(unit), TimeElapsedColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield _Bar(progress, progress.add_task(f"{name:<10}", total=total))
        self._print_done(name, total, unit, started)

    def _print_done(self, name: str, total: int, unit: str, started: float) -> None:
        seconds = time.monotonic() - started
        when = "" if self.console.is_terminal else _now()
        self.console.print(f"{when}[green]done[/] {name:<10} {total:>7} {unit}  {seconds:6.1f} s")

    def note(self, message: str) -> None:
        when = "" if self.console.is_terminal else _now()
        self.console.print(f"{when}     {message}", markup=False)


def _now() -> str:
    return f"{datetime.now():%m-%d %H:%M:%S} "
