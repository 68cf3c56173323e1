"""Moves of aliases: a journal that orders them, so that any number of people may move at once.

MLflow sets an alias whoever asks, and keeps no history. So a move is first written into a journal
in the registry itself (``NAME.moves``: versions of a model, whose numbers the registry gives out
one by one), with where its alias stood. It takes effect if that was still so when it was written:
of two that race, one wins and the other learns of it. Aliases then follow the journal; whoever sets
one reads the journal again afterwards, and sets it anew until both agree.
"""

import getpass
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from pixart_platform.errors import PixartError, RegistryError
from pixart_platform.registry import Registry

CHAMPION = "champion"
PREVIOUS = "previous"
_MAX_WHY = 1000  # characters
_SETTLE_SECONDS = 5.0  # for a move of somebody else's to reach its alias
_ATTEMPTS = 50
_FOUND = "unknown"  # who moved an alias that stands elsewhere than the journal says


class MoveLost(RegistryError):
    """Somebody else moved the alias meanwhile."""


@dataclass(frozen=True)
class Move:
    """An alias that was pointed from version ``before`` (0: nothing) to ``after``."""

    at: float
    """Unix seconds."""
    alias: str
    before: int
    after: int
    who: str
    why: str
    key: str


def effective(moves: Iterable[Move]) -> tuple[list[Move], dict[str, int]]:
    """The moves that took effect, in order, and where aliases stand after them.

    ``previous`` is what ``champion`` was before; a move that never reached its alias, or was undone
    by hand, leaves it as it was.
    """
    standing: dict[str, int] = {}
    earlier: dict[str, dict[str, int]] = {}  # where all stood before an alias was last moved
    done = []
    for move in moves:
        if move.before != standing.get(move.alias, 0) or move.before == move.after:
            continue
        done.append(move)
        undone = earlier.get(move.alias, {})
        earlier[move.alias] = dict(standing)
        if move.alias == CHAMPION:
            found_back = move.who == _FOUND and undone.get(CHAMPION) == move.after
            standing[PREVIOUS] = undone.get(PREVIOUS, 0) if found_back else move.before
        standing[move.alias] = move.after
    return done, standing


def history(registry: Registry) -> list[Move]:
    """All moves that took effect, oldest first."""
    return effective(_read(registry))[0]


def move(
    registry: Registry,
    alias: str,
    choose: Callable[[dict[str, int]], int],
    why: str,
    *,
    insist: bool = True,
) -> Move | None:
    """Point ``alias`` at the version that ``choose`` finds for where aliases stand; None if there.

    ``choose`` may raise to refuse; it is asked again when somebody else was faster. Without
    ``insist`` that raises MoveLost instead. Raises RegistryError: unless it says that the move is
    written down, aliases are as they were, and if it does, running the command again finishes it.
    """
    if len(why) > _MAX_WHY:
        raise PixartError(f"why = {why[:40]!r}...: {len(why)} characters; at most {_MAX_WHY}")
    for _ in range(_ATTEMPTS):
        standing = settle(registry, alias)
        version = choose(standing)
        mine = _new(alias, standing.get(alias, 0), version, why)
        if mine.before == mine.after:
            return None
        _write(registry, mine)
        try:
            done = _follow(registry, alias)
        except RegistryError as error:
            raise RegistryError(
                f"the move of {alias} to version {version} is written down, but {error}; run it "
                f"again"
            ) from error
        if mine.key in {m.key for m in done}:
            return mine
        winner = next((m for m in reversed(done) if m.alias == alias), None)
        if not insist and winner:
            raise MoveLost(
                f"{alias} was moved to version {winner.after} by {winner.who} meanwhile "
                f"({winner.why or 'no reason given'}); nothing was done"
            )
    raise MoveLost(f"{alias} was moved by others {_ATTEMPTS} times meanwhile; nothing was done")


def settle(registry: Registry, alias: str) -> dict[str, int]:
    """Where aliases stand, once the journal and the alias agree.

    They do not while somebody's move is under way: it is waited for. They do not either when a
    move broke off or somebody set the alias elsewhere: where it was found is then written down as
    a move, for that is what drew.
    """
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        standing = effective(_read(registry))[1]
        found = registry.aliases()
        noted = standing.get(alias, 0)
        if found.get(alias, 0) == noted:
            return standing
        if not noted or time.monotonic() > deadline:
            _write(registry, _new(alias, noted, found.get(alias, 0), "found so", who=_FOUND))
            _follow(registry, alias)
        else:
            time.sleep(0.1)


def _follow(registry: Registry, alias: str) -> list[Move]:
    """Set ``alias`` (and ``previous`` with the champion) to where the journal says."""
    while True:
        done, standing = effective(_read(registry))
        found = registry.aliases()
        names = [PREVIOUS, alias] if alias == CHAMPION else [alias]
        stale = [n for n in names if standing.get(n) and standing[n] != found.get(n)]
        for name in stale:
            registry.set_alias(name, registry.get(str(standing[name])))
        if not stale:
            return done


def _read(registry: Registry) -> list[Move]:
    try:
        return [Move(**json.loads(text)) for text in registry.journal()]
    except (TypeError, ValueError) as error:
        raise RegistryError(
            f"the journal of {registry.name} was changed by hand: {error}"
        ) from error


def _write(registry: Registry, entry: Move) -> None:
    registry.append(registry.get(str(entry.after or entry.before)), json.dumps(asdict(entry)))


def _new(alias: str, before: int, after: int, why: str, who: str = "") -> Move:
    return Move(time.time(), alias, before, after, who or whoever(), why, uuid.uuid4().hex)


def whoever() -> str:
    """The user, or the number of one without a name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
