"""Promotion: gates that say which metric failed and by how much; aliases that move or stay."""

import getpass
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_load import Models, register_models
from test_serve_follower import flip_one_bit
from test_serve_snapshots import build_drawer, write_snapshot

from pixart_cluster.recipe import read_recipe
from pixart_jobs.certainty import Figure
from pixart_jobs.moves import history
from pixart_jobs.promote import (
    PromotionRefused,
    check_gates,
    evaluation_tag,
    inputs_of,
    lineage,
    measured,
    promote,
    roll_back,
)
from pixart_jobs.recipe import EvaluateSettings, Recipe
from pixart_models.drawing import DrawingError
from pixart_models.snapshot import WEIGHTS_FILE
from pixart_platform.errors import PixartError, RegistryError
from pixart_platform.registry import Version
from pixart_platform.tracking import Tracker

Figures = dict[str, float | tuple[float, float, float]]


def make_version(figures: Figures, number: int = 7, basis: str = "b") -> Version:
    shown = {
        name: Figure(*f) if isinstance(f, tuple) else Figure(f, f - 0.05, f + 0.05)
        for name, f in figures.items()
    }
    return Version("digits", number, "/nowhere", evaluation_tag("digits", basis, "r", shown))


def make_recipe(**gates: Any) -> Recipe:
    recipe = read_recipe("digits")
    return recipe.model_copy(update={"evaluate": EvaluateSettings.model_validate(gates)})


def refuse(figures: Figures, champion: Version | None = None, **gates: Any) -> str:
    with pytest.raises(PromotionRefused) as caught:
        check_gates(make_recipe(**gates), make_version(figures), champion)
    return str(caught.value)


def test_a_version_that_reaches_every_gate_passes() -> None:
    gates = {"digit_accuracy": 0.8, "color_accuracy": 0.9}
    good = make_version({"digit_accuracy": 0.8, "color_accuracy": 1.0})
    check_gates(make_recipe(minimum=gates), good, None)
    check_gates(make_recipe(), make_version({}), None)


def test_a_gate_names_its_metric_and_by_how_much_it_was_missed() -> None:
    message = refuse({"digit_accuracy": 0.7}, minimum={"digit_accuracy": 0.8})
    assert "digits version 7 is not promoted" in message
    assert "digit_accuracy = 0.700 is below 0.8 by 0.100" in message
    assert "Train longer, or change the gates" in message


def test_every_missed_gate_is_named_and_no_other() -> None:
    gates = {"digit_accuracy": 0.8, "color_accuracy": 0.9, "relation_accuracy": 0.5}
    found: Figures = {"digit_accuracy": 0.1, "color_accuracy": 0.2, "relation_accuracy": 0.6}
    message = refuse(found, minimum=gates)
    assert "digit_accuracy = 0.100" in message
    assert "color_accuracy = 0.200" in message
    assert "relation_accuracy" not in message
    assert "= 0.200 is above 0.1 by 0.100" in refuse(found, maximum={"color_accuracy": 0.1})


def test_a_metric_nobody_measured_does_not_pass() -> None:
    gates = {"relation_accuracy": 0.5}
    message = refuse({"digit_accuracy": 1.0, "color_accuracy": 1.0}, minimum=gates)
    assert "relation_accuracy was not measured (it has color_accuracy, digit_accuracy)" in message
    assert "was not measured (it has no figures at all)" in refuse({}, minimum=gates)


def test_a_metric_that_is_not_a_number_does_not_pass() -> None:
    nan = float("nan")
    assert "digit_accuracy = nan is below 0.8" in refuse(
        {"digit_accuracy": nan}, minimum={"digit_accuracy": 0.8}
    )
    best = make_version({"digit_accuracy": 0.5}, number=3)
    assert "is worse than" in refuse({"digit_accuracy": nan}, best, not_worse=["digit_accuracy"])


def test_nothing_worse_than_the_champion_beyond_its_interval_passes() -> None:
    recipe = make_recipe(not_worse=["digit_accuracy"])
    champion = make_version({"digit_accuracy": (0.95, 0.92, 0.97)}, number=3)
    check_gates(recipe, make_version({"digit_accuracy": 0.92}), champion)
    check_gates(recipe, make_version({"digit_accuracy": 0.5}), None)
    message = refuse({"digit_accuracy": 0.9}, champion, not_worse=["digit_accuracy"])
    assert (
        "digit_accuracy = 0.900 is worse than the champion's (version 3) 0.950 (0.920 to 0.970) by "
        "0.020 beyond that interval" in message
    )


def test_what_was_measured_otherwise_is_not_compared() -> None:
    gate: Any = {"not_worse": ["digit_accuracy"]}
    other = make_version({"digit_accuracy": 0.5}, number=3, basis="c")
    assert "was measured on b, the champion's (version 3) on c" in refuse(
        {"digit_accuracy": 0.9}, other, **gate
    )
    assert "pixart evaluate 3" in refuse({"digit_accuracy": 0.9}, make_version({}, 3), **gate)


def test_a_tag_changed_by_hand_is_named() -> None:
    version = replace(make_version({}), tags={"evaluation.digits": "good"})
    with pytest.raises(RegistryError, match=r"version 7: its tag evaluation.digits was changed"):
        measured(version)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """Three versions; the first is champion."""
    return register_models(tmp_path, 3)


def move_to(models: Models, number: int, **options: str) -> None:
    version = models.registry.get(str(number))
    promote(make_recipe(), models.registry, version, **options)


def test_a_promotion_moves_the_alias_keeps_the_one_before_and_is_written_down(
    models: Models,
) -> None:
    move_to(models, 2, why="reads better")
    assert models.registry.aliases() == {"champion": 2, "previous": 1}
    move_to(models, 3, alias="challenger")
    assert models.registry.aliases() == {"champion": 2, "previous": 1, "challenger": 3}
    move_to(models, 2)
    by_hand, first, second = history(models.registry)
    assert (by_hand.after, by_hand.who, by_hand.why) == (1, "unknown", "found so")
    assert (first.alias, first.before, first.after) == ("champion", 1, 2)
    assert (first.who, first.why) == (getpass.getuser(), "reads better")
    assert (second.alias, second.before, second.after) == ("challenger", 0, 3)
    assert first.at < second.at


def test_a_reason_too_long_to_keep_moves_nothing_and_a_nameless_user_has_a_number(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PixartError, match="1001 characters; at most 1000"):
        move_to(models, 2, why="x" * 1001)
    assert models.registry.aliases() == {"champion": 1}

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1000710000")

    monkeypatch.setattr(getpass, "getuser", nobody)
    move_to(models, 2, why="x" * 1000)
    _, move = history(models.registry)
    assert move.who == f"uid {os.getuid()}"


def test_going_back_is_one_call_and_so_is_going_back_again(models: Models) -> None:
    with pytest.raises(RegistryError, match="no version or alias 'previous'"):
        roll_back(models.registry)
    move_to(models, 2)
    assert roll_back(models.registry).number == 1
    assert models.registry.aliases() == {"champion": 1, "previous": 2}
    assert roll_back(models.registry, "it was not that").number == 2
    assert [move.why for move in history(models.registry)][1:] == [
        "",
        "rolled back",
        "it was not that",
    ]


@pytest.mark.parametrize("forward", [True, False])
def test_no_alias_names_a_version_with_a_flipped_bit(models: Models, forward: bool) -> None:
    if not forward:
        move_to(models, 2)
    bad = 2 if forward else 1
    flip_one_bit(models.registry.get(str(bad)).fetch() / WEIGHTS_FILE)
    before = models.registry.aliases()
    move = partial(move_to, models, 2) if forward else partial(roll_back, models.registry)
    with pytest.raises(RegistryError, match=f"version {bad}"):
        move()
    assert models.registry.aliases() == before
    assert len(history(models.registry)) == (0 if forward else 2)


def test_weights_that_draw_no_numbers_are_not_promoted(models: Models, tmp_path: Path) -> None:
    drawer = build_drawer(9)
    with torch.no_grad():
        drawer.network.final_layer.linear.bias.fill_(1e38)  # finite, what it draws is not
    number = register(models, tmp_path, drawer_folder=write_snapshot(tmp_path / "huge", drawer))
    with pytest.raises(DrawingError, match="not finite"):
        move_to(models, number)
    assert models.registry.aliases() == {"champion": 1}


def register(models: Models, root: Path, drawer_folder: Path, **tags: str) -> int:
    tracker = Tracker.start(models.uri, "serving", "more", "more", artifacts=root)
    version = models.registry.register(drawer_folder, tracker.run_id, tags)
    tracker.finish()
    return version.number


def test_lineage_goes_back_to_the_first_and_notices_a_changed_parent(
    models: Models, tmp_path: Path
) -> None:
    parent = models.registry.get("1")
    child = write_snapshot(tmp_path / "child", build_drawer(8))
    number = register(
        models, tmp_path, child, stage="align", parent_version="1", recipe_digest="r",
        input_parent=parent.tags["digest"], input_images="i",
    )  # fmt: skip
    version = models.registry.get(str(number))
    assert version.run_id
    assert [v.number for v in lineage(models.registry, version)] == [number, 1]
    assert inputs_of(version) == {"parent": parent.tags["digest"], "images": "i"}
    models.registry.tag(version, {"input_parent": "another"})
    with pytest.raises(RegistryError, match="changed by hand"):
        list(lineage(models.registry, models.registry.get(str(number))))
