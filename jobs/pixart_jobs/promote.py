"""Who draws for services: gates, the aliases that say so, and where a version came from.

A version is verified and drawn with before an alias names it, forward or back, and measured against
the recipe's gates and the champion. Each move is written down for good, with who and why.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pixart_jobs import moves
from pixart_jobs.certainty import LOWER_IS_BETTER, Figure
from pixart_jobs.moves import CHAMPION, PREVIOUS
from pixart_jobs.recipe import Recipe
from pixart_models.drawing import load_drawer
from pixart_platform.errors import PixartError, RegistryError
from pixart_platform.registry import Registry, Version
from pixart_platform.tracking import read_run

RESULT_FILE = "evaluation.json"  # of an evaluation's run in MLflow: all that it found
_EVALUATION = "evaluation."  # and the suite: a tag of a version


class PromotionRefused(PixartError):
    """A version that did not pass a gate; aliases are as they were."""


@dataclass(frozen=True)
class Measured:
    """A figure of an evaluation; only those on the same ``basis`` can be compared."""

    figure: Figure
    basis: str
    suite: str
    run: str
    """Id of the evaluation's run in MLflow."""


def measured(version: Version) -> dict[str, Measured]:
    """What its evaluations found, by metric; of a metric of two suites the first by name.

    Raises RegistryError if it cannot be read.
    """
    found: dict[str, Measured] = {}
    for key, text in sorted(version.tags.items(), reverse=True):
        if not key.startswith(_EVALUATION):
            continue
        try:
            told, suite = json.loads(text), key.removeprefix(_EVALUATION)
            for metric, (value, low, high) in told["figures"].items():
                figure = Figure(float(value), float(low), float(high))
                found[metric] = Measured(figure, told["basis"], suite, told["run"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RegistryError(
                f"{version.name} version {version.number}: its tag {key} was changed by hand "
                f"({error}); run pixart evaluate {version.number} again"
            ) from error
    return found


def evaluation_tag(
    suite: str, basis: str, run_id: str, figures: dict[str, Figure]
) -> dict[str, str]:
    """The tag that ``measured`` reads."""
    shown = {n: [float(f"{v:.6g}") for v in (f.value, f.low, f.high)] for n, f in figures.items()}
    text = json.dumps({"figures": shown, "basis": basis, "run": run_id})
    return {f"{_EVALUATION}{suite}": text}


def check_gates(recipe: Recipe, version: Version, champion: Version | None) -> None:
    """Raise PromotionRefused naming each gate that fails and by how much."""
    settings, found = recipe.evaluate, measured(version)
    failures = []
    for name, bound, sign, side in (
        *((n, b, 1, "below") for n, b in settings.minimum.items()),
        *((n, b, -1, "above") for n, b in settings.maximum.items()),
    ):
        if name not in found:
            failures.append(f"{name} was not measured (it has {_known(found)})")
        elif not sign * (found[name].figure.value - bound) >= 0:  # so that nan fails, too
            value = found[name].figure.value
            failures.append(f"{name} = {value:.3f} is {side} {bound:g} by {abs(value - bound):.3f}")
    if champion and champion.number != version.number:
        best = measured(champion)
        failures += filter(None, (_worse(n, found, best, champion) for n in settings.not_worse))
    if failures:
        raise PromotionRefused(
            f"{version.name} version {version.number} is not promoted: {'; '.join(failures)}. "
            f"Train longer, or change the gates under evaluate"
        )


def _worse(
    name: str, found: dict[str, Measured], best: dict[str, Measured], champion: Version
) -> str:
    """By how much a metric is worse than the champion's, if it is, or cannot be told."""
    theirs = f"the champion's (version {champion.number})"
    if name not in found:
        return f"{name} was not measured (it has {_known(found)})"
    if name not in best:
        return f"{theirs} {name} was not measured: pixart evaluate {champion.number}"
    mine, other = found[name], best[name]
    if mine.basis != other.basis:
        return (
            f"{name} was measured on {mine.basis}, {theirs} on {other.basis}: evaluate both with "
            f"this recipe"
        )
    low, high, value = other.figure.low, other.figure.high, mine.figure.value
    good = value <= high if name in LOWER_IS_BETTER else value >= low
    bound = high if name in LOWER_IS_BETTER else low
    told = f"{name} = {value:.3f} is worse than {theirs} {other.figure} by {abs(value - bound):.3f}"
    return "" if good else f"{told} beyond that interval"


def _known(found: dict[str, Measured]) -> str:
    return ", ".join(sorted(found)) or "no figures at all"


def promote(
    recipe: Recipe, registry: Registry, version: Version, *, alias: str = CHAMPION, why: str = ""
) -> None:
    """Check the gates, verify the snapshot, draw with it, move ``alias``.

    Where ``champion`` moves, ``previous`` keeps what it was. The version is loaded here, with its
    encoders. Raises PromotionRefused, RegistryError or ModelInputError, with aliases as they were.
    """
    _try(version)

    def choose(standing: dict[str, int]) -> int:
        number = standing.get(CHAMPION)
        check_gates(recipe, version, registry.get(str(number)) if number else None)
        return version.number

    choose(registry.aliases())  # what does not pass leaves no trace
    moves.move(registry, alias, choose, why)


def roll_back(registry: Registry, why: str = "") -> Version:
    """Point ``champion`` at ``previous``, verified and tried, and ``previous`` at what it was.

    Raises MoveLost if the champion changes meanwhile, RegistryError or ModelInputError, with
    aliases as they were.
    """
    standing = moves.settle(registry, CHAMPION)
    version = registry.get(str(standing.get(PREVIOUS) or PREVIOUS))
    _try(version)

    def choose(now: dict[str, int]) -> int:
        if now.get(CHAMPION) != standing.get(CHAMPION):
            raise moves.MoveLost(
                f"champion was moved to version {now.get(CHAMPION)} meanwhile; nothing was done"
            )
        return version.number

    moves.move(registry, CHAMPION, choose, why or "rolled back", insist=False)
    return version


def find_version(registry: Registry, reference: str) -> Version:
    """By number, alias, or a run's id: the last it registered, itself or by its pipeline's jobs.

    Raises RegistryError, naming what there is.
    """
    if not re.fullmatch(r"[0-9a-f]{32}", reference):
        return registry.get(reference)
    versions = registry.versions()
    for version in reversed(versions):
        run_id = version.run_id
        if run_id and reference in (run_id, read_run(registry.uri, run_id).parent):
            return version
    runs = ", ".join(f"{v.run_id} (version {v.number})" for v in versions[-3:] if v.run_id)
    raise RegistryError(
        f"run {reference} has registered no version of model {registry.name!r}; "
        f"{f'the last that did: {runs}' if runs else 'no run has'}"
    )


def inputs_of(version: Version) -> dict[str, str]:
    """Digests of what it was made from: tables by kind, and ``parent``."""
    tags = version.tags.items()
    return {k.removeprefix("input_"): v for k, v in tags if k.startswith("input_")}


def lineage(registry: Registry, version: Version) -> Iterator[Version]:
    """The version and its ancestors back to the first.

    Raises RegistryError for a parent that is gone, or that is not the one trained from.
    """
    while True:
        yield version
        if not version.tags.get("parent_version"):
            return
        parent, trained_from = registry.get(version.tags["parent_version"]), inputs_of(version)
        if trained_from.get("parent") != parent.tags.get("digest"):
            raise RegistryError(
                f"{version.name} version {version.number} was trained from a snapshot with digest "
                f"{trained_from.get('parent')}, but version {parent.number} has "
                f"{parent.tags.get('digest')}: the registry was changed by hand"
            )
        version = parent


def _try(version: Version) -> None:
    """Verify every byte and draw with it."""
    load_drawer(version.fetch()).check()
