"""Where benchmark figures are kept: one JSON file by theme, hardware and month."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "benchmarks" / "results"


def figure(value: float, bar: float, *, at_most: bool = False, digits: int = 3) -> dict[str, Any]:
    """A figure beside its bar, and whether it is met."""
    return {
        "value": round(value, digits), "bar": bar, "ok": value <= bar if at_most else value >= bar,
    }  # fmt: skip


def record(
    theme: str,
    figures: dict[str, Any],
    packages: Iterable[str],
    folder: Path = RESULTS,
    hardware: str = "",
    **more: Any,
) -> None:
    """Write the figures with what they were measured on, and the command that makes them again."""
    name = hardware or f"cpu{os.cpu_count()}"
    now = datetime.now(UTC)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True,
        cwd=RESULTS.parent,
    )  # fmt: skip
    script = Path(sys.argv[0]).name
    document = {
        "hardware": name, "date": now.date().isoformat(), "commit": commit.stdout.strip(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "command": " ".join(["python", f"tests/benchmarks/{script}", *sys.argv[1:]]),
        "figures": figures, **more,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    path = folder / f"{theme}_{name.lower().replace(' ', '-')}_{now:%Y%m}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
