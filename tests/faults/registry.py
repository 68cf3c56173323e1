"""Aliases under fire: people who promote and roll back at once, damaged versions, a lost server.

    .venv/bin/python tests/faults/registry.py [--moves 50] [--people 4] [--backend postgresql]

A real MLflow server on SQLite or on PostgreSQL, and processes that race until so many moves have
taken effect: each promotes versions at random, two of which have one flipped bit, and rolls back.
Meanwhile the server is killed and started again, twice, and two of the people are killed in the
middle of whatever they do and replaced. All the while aliases are watched.

Right is: no alias ever names a damaged version; each move that a person was told of is in the
history; there each move begins where the last one ended; at the end the aliases are where it ends
(after one more command, where a killed person or a lost server left a move half done), and every
version they name verifies.

About 3 minutes on 2 cores. The last line is one JSON object of figures; the exit code is 1 when one
misses its bar.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from mlflow_server import ServerProcess
from recording import figure
from serving_load import register_models
from team_server import postgres
from test_serve_follower import flip_one_bit

from pixart_cluster.recipe import FullRecipe, read_recipe
from pixart_jobs import moves
from pixart_jobs.promote import promote, roll_back
from pixart_models.snapshot import WEIGHTS_FILE
from pixart_platform.errors import PixartError, RegistryError
from pixart_platform.registry import Registry
from pixart_platform.tracking import sqlite_uri

VERSIONS, DAMAGED = 8, (4, 7)
AWAY_SECONDS = 4.0
PATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


def without_gates() -> FullRecipe:
    recipe = read_recipe("digits")
    gates = recipe.evaluate.model_copy(update={"minimum": {}})
    return recipe.model_copy(update={"evaluate": gates})


def race(uri: str, seed: int, log: Path, stop: Path) -> None:
    """One person: promote or roll back, again and again; a line of JSON for how each ended."""
    rng, recipe = random.Random(seed), without_gates()
    with log.open("a") as told:
        while not stop.exists():
            number = rng.randint(1, VERSIONS)
            why = f"{seed}:{rng.random()}"
            ended = "moved"
            try:
                registry = Registry(uri, "digits")
                if rng.random() < 0.25:
                    number = roll_back(registry, why).number
                else:
                    alias = "challenger" if rng.random() < 0.2 else "champion"
                    promote(recipe, registry, registry.get(str(number)), alias=alias, why=why)
            except PixartError as error:
                ended = f"{type(error).__name__}: {error}"
                time.sleep(0.2 if "the registry at" in ended else 0)
            told.write(json.dumps({"why": why, "number": number, "ended": ended}) + "\n")
            told.flush()


@contextmanager
def people(uri: str, root: Path, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    (root / "people").mkdir()
    everyone = [person(uri, root, seed) for seed in range(count)]
    try:
        yield everyone
    finally:
        (root / "stop").touch()
        for one in everyone:
            try:
                one.wait(120)
            except subprocess.TimeoutExpired:
                one.kill()


def person(uri: str, root: Path, seed: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, __file__, "--person", str(seed), uri, str(root)]
    return subprocess.Popen(command, env=os.environ | PATIENT)


def watch(registry: Registry, seen: set[int]) -> int:
    """Note which versions aliases name; how many moves have taken effect."""
    try:
        seen |= set(registry.aliases().values())
        return len(moves.history(registry))
    except RegistryError:
        return -1


def run(backend: str, root: Path, num_moves: int, num_people: int) -> dict[str, object]:
    models = register_models(root, VERSIONS, uri=backend)
    for number in DAMAGED:
        flip_one_bit(Path(models.registry.get(str(number)).source) / WEIGHTS_FILE)
    server = ServerProcess(root, backend)
    server.start()
    registry, seen = models.registry, set[int]()  # looks into the database, past the server
    chaos = iter([("server", 0.2), ("person", 0.35), ("server", 0.55), ("person", 0.75)])
    due = next(chaos, None)
    began = time.monotonic()
    with people(server.uri, root, num_people) as everyone:
        while (done := watch(registry, seen)) < num_moves and time.monotonic() < began + 900:
            if due and done >= due[1] * num_moves:
                if due[0] == "server":
                    server.kill()
                    time.sleep(AWAY_SECONDS)
                    server.start()
                else:
                    victim = everyone.pop(0)
                    victim.kill()
                    victim.wait()
                    everyone.append(person(server.uri, root, 100 + done))
                due = next(chaos, None)
            time.sleep(0.05)
    watch(registry, seen)
    figures = judge(registry, root, seen) | {"seconds": round(time.monotonic() - began)}
    server.kill()
    return figures


def judge(registry: Registry, root: Path, seen: set[int]) -> dict[str, object]:
    told = [
        json.loads(line)
        for log in sorted((root / "people").iterdir())
        for line in log.read_text().splitlines()
    ]
    ends = [str(t["ended"]) for t in told]
    moved = [t for t in told if t["ended"] == "moved"]
    done = moves.history(registry)
    by_why = {m.why: m for m in done}
    champions = [m for m in done if m.alias == moves.CHAMPION]
    named = registry.aliases()
    # Whoever promotes what is champion already moves nothing, and is told so by success.
    idle = [t for t in moved if t["why"] not in by_why]
    standing = moves.effective(done)[1]
    half_done = [a for a in (moves.CHAMPION, "challenger") if named.get(a) != standing.get(a)]
    for alias in half_done:
        promote(without_gates(), registry, registry.get("1"), alias=alias, why="mend")
    named, standing = registry.aliases(), moves.effective(moves.history(registry))[1]
    for number in named.values():
        registry.get(str(number)).verify()
    return {
        "moves": len(done),
        "told_moved": len(moved) - len(idle),
        "already_there": len(idle),
        "refused_damaged": sum("digest" in e or "not the ones" in e for e in ends),
        "lost_races": sum(e.startswith("MoveLost") for e in ends),
        "server_away": sum("the registry at" in e for e in ends),
        "written_down_and_finished_later": sum("written down" in e for e in ends),
        "found_so": sum(m.who == "unknown" for m in done),
        "half_done_at_end": half_done,
        "other_ends": sorted({e[:150] for e in ends if not known(e)}),
        "damaged_named": figure(len(seen & set(DAMAGED)), 0, at_most=True),
        "damaged_in_history": figure(sum(m.after in DAMAGED for m in done), 0, at_most=True),
        "gaps_in_history": figure(
            sum(a.after != b.before for a, b in pairwise(champions)),
            0,
            at_most=True,
        ),
        "wrong_in_history": figure(
            sum(by_why[t["why"]].after != t["number"] for t in moved if t["why"] in by_why),
            0,
            at_most=True,
        ),
        "aliases_off": figure(
            sum(named.get(a, 0) != n for a, n in standing.items()), 0, at_most=True
        ),
    }


def known(end: str) -> bool:
    return end == "moved" or any(
        part in end
        for part in ("digest", "not the ones", "MoveLost", "the registry at", "alias 'previous'")
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--moves", type=int, default=50)
    parser.add_argument("--people", type=int, default=4)
    parser.add_argument("--backend", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--person", nargs=3, metavar=("SEED", "URI", "ROOT"))
    told = parser.parse_args()
    if told.person:
        seed, uri, root = told.person
        log, stop = Path(root) / "people" / f"{seed}.jsonl", Path(root) / "stop"
        return race(uri, int(seed), log, stop)
    with tempfile.TemporaryDirectory(prefix="pixart-registry-") as folder, ExitStack() as stack:
        root, backend = Path(folder), sqlite_uri(Path(folder))
        if told.backend == "postgresql":
            backend = f"{stack.enter_context(postgres())}/mlflow"
        figures = run(backend, root, told.moves, told.people)
    print(json.dumps(figures))
    sys.exit(any(isinstance(f, dict) and not f.get("ok", True) for f in figures.values()))


if __name__ == "__main__":
    main()
