"""The runbook tells the truth: its headings, its commands, and that a backup brings all back."""

import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import typer.main
from builders import write_table
from processes import REPOSITORY, repeatedly
from runbook import RUNBOOK, add_version, blocks, shell
from serving_load import register_models

from pixart_cluster.cli import cli
from pixart_platform.registry import Registry
from pixart_platform.storage import open_folder
from pixart_platform.tables import verify_table
from pixart_platform.tracking import sqlite_uri

HEADINGS = [
    "Bring up", "Upgrade", "Back up and restore", "A lost head node", "A hung collective",
    "A full disk", "A poisoned checkpoint", "A node that keeps dying", "A service that refuses",
    "A queue that grows", "A registry that is away",
]  # fmt: skip
HERE = "export RUN=runs/demo BACKUP=backup/demo\n"


def test_headings_are_the_ones_alerts_point_to() -> None:
    assert re.findall(r"^## (.*)$", RUNBOOK, re.M) == HEADINGS
    for heading in HEADINGS[3:]:
        part = RUNBOOK.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        for word in ("**Symptom.**", "**Cause.**", "**Command.**"):
            assert part.count(word) == 1, (heading, word)


def test_every_pixart_command_and_option_in_it_exists() -> None:
    root: Any = typer.main.get_command(cli)
    text = re.sub(r"\\\n", " ", RUNBOOK)
    seen = 0
    for line in re.findall(r"(?:^ *|`)pixart ([a-z][^`\n#]*)", text, re.M):
        words, command = line.split(), root
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        options = {name for p in command.params for name in p.opts}
        for word in words:
            assert not word.startswith("--") or word in options, f"{word} in: pixart {line}"
        seen += 1
    assert seen > 15


def test_a_policy_is_made_of_its_template(tmp_path: Path) -> None:
    (tmp_path / "cluster").symlink_to(REPOSITORY / "cluster")
    (line,) = [b for b in blocks("Bring up") if "policies" in b]
    made = shell(line, tmp_path)
    assert "arn:aws:s3:::models/tables/*" in made
    assert "BUCKET" not in made


@pytest.mark.slow
def test_what_was_backed_up_while_somebody_worked_is_sound_when_restored(tmp_path: Path) -> None:
    for tool in ("rclone", "sqlite3"):
        if not shutil.which(tool):
            pytest.skip(f"no {tool} here: apt-get install {tool} (make setup does, as root)")
    root = tmp_path / "runs" / "demo"
    models = register_models(root, 2)
    first = write_table(root / "tables" / "captions-1", "captions/2", [[{"captions": ["a"]}]])
    unfinished = root / "tables" / "captions-2"
    write_table(unfinished, "captions/2", [[{"captions": ["a"]}]])
    (unfinished / "manifest.json").unlink()
    back_up, restore, *_ = blocks("Back up and restore")
    place = open_folder(root)
    with repeatedly(lambda n: add_version(models.registry, place, 100 + n)) as made:
        while not made[0]:
            time.sleep(0.01)
        before = made[0]
        while made[0] < before + 2:  # again, until something was written while one was taken
            shell(back_up, tmp_path)
    shutil.rmtree(tmp_path / "runs")

    told = shell(restore, tmp_path)
    assert "digits version 1" in told, "the lineage of the champion"
    (tmp_path / "copy").mkdir()  # MLflow holds the database that was deleted open at its old name
    shutil.copy(root / "mlflow.db", tmp_path / "copy")
    versions = Registry(sqlite_uri(tmp_path / "copy"), "digits").versions()
    assert len(versions) >= 2 + before
    for version in versions:
        version.verify()
    tables = [path.parent for path in root.glob("tables/*/manifest.json")]
    assert len(tables) >= 1 + before
    assert unfinished not in tables
    for table in tables:
        verify_table(table)
    assert verify_table(root / "tables" / "captions-1").digest == first.digest
