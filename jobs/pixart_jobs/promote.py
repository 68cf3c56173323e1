"""Promotion: an evaluated version that passes its gates becomes what services draw with."""

from pixart_jobs.recipe import Recipe
from pixart_platform.errors import PixartError
from pixart_platform.registry import Registry, Version

CHAMPION = "champion"
PREVIOUS = "previous"


class PromotionRefused(PixartError):
    """A version that did not pass a gate; aliases are as they were."""


def check_gates(recipe: Recipe, version: Version, metrics: dict[str, float]) -> None:
    """Raise PromotionRefused naming each gate that fails and by how much."""
    failures = []
    for name, minimum in recipe.evaluate.minimum.items():
        value = metrics.get(name)
        if value is None:
            failures.append(f"{name} was not measured (it has {', '.join(sorted(metrics))})")
        elif not value >= minimum:  # so that nan fails, too
            failures.append(f"{name} = {value:.3f} is below {minimum:g} by {minimum - value:.3f}")
    if failures:
        raise PromotionRefused(
            f"{version.name} version {version.number} is not promoted: {'; '.join(failures)}. "
            f"Train longer, or lower evaluate.minimum"
        )


def promote(
    recipe: Recipe, registry: Registry, version: Version, metrics: dict[str, float]
) -> None:
    """Verify the snapshot, check the gates, move ``champion`` and keep ``previous``."""
    version.verify()
    check_gates(recipe, version, metrics)
    standing = registry.aliases().get(CHAMPION)
    if standing == version.number:
        return
    if standing is not None:
        registry.set_alias(PREVIOUS, registry.get(str(standing)))
    registry.set_alias(CHAMPION, version)
