"""The runbook's own lines, run as they are, and somebody who works while they are."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from builders import write_table
from processes import REPOSITORY
from test_serve_snapshots import build_drawer, write_snapshot

from pixart_platform.copies import publish
from pixart_platform.registry import Registry
from pixart_platform.storage import Folder

RUNBOOK = (REPOSITORY / "cluster" / "README.md").read_text()


def blocks(heading: str) -> list[str]:
    """The commands below a heading."""
    part = RUNBOOK.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [re.sub(r"^ +", "", b, flags=re.M) for b in re.findall(r"```sh\n(.*?)```", part, re.S)]


def shell(script: str, folder: Path) -> str:
    """Run lines of the runbook as they are, in ``folder``, with ``pixart`` on the path."""
    here = str(Path(sys.executable).parent)
    ours = {"PATH": f"{here}:{os.environ['PATH']}", "RCLONE_CONFIG": ""}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=os.environ | ours,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def add_version(registry: Registry, place: Folder, number: int) -> None:
    """One more table and one more version of what somebody works on."""
    rows = [[{"id": f"{k:016x}".ljust(64, "0"), "captions": ["x"]}] for k in range(20)]
    write_table(place / f"tables/captions-{number}", "captions/2", rows)
    with tempfile.TemporaryDirectory() as made:
        publish(
            write_snapshot(Path(made) / "snapshot", build_drawer(number)),
            place / f"snapshots/{number}",
        )
    registry.register(place / f"snapshots/{number}", "", {})
