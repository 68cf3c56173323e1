"""Progress on a terminal: one bar a job while it runs, one line when it is done.

Where there is no terminal (CI, a log file) only the lines are printed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class _Bar:
    progress: Progress
    task: int

    def reach(self, done: int) -> None:
        self.progress.update(self.task, completed=done)  # type: ignore[arg-type]


class _Silent:
    def reach(self, done: int) -> None:
        """Nobody is watching."""


class ConsoleMonitor:
    """Shows a pipeline's jobs with rich."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    @contextmanager
    def job(self, name: str, total: int, unit: str) -> Iterator[_Bar | _Silent]:
        started = time.monotonic()
        if not self.console.is_terminal:
            yield _Silent()
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
        self.console.print(f"[green]done[/] {name:<10} {total:>7} {unit}  {seconds:6.1f} s")

    def note(self, message: str) -> None:
        self.console.print(f"     {message}", markup=False)
