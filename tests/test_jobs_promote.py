"""Promotion: gates that say which metric failed and by how much."""

from pathlib import Path

import pytest

from pixart_cluster.recipe import read_recipe
from pixart_jobs.evaluate import PromotionRefused, check_gates
from pixart_jobs.recipe import EvaluateSettings, Recipe
from pixart_platform.registry import Version

VERSION = Version("digits", 7, Path("/nowhere"), {})


def make_recipe(minimum: dict[str, float]) -> Recipe:
    recipe = read_recipe("digits")
    return recipe.model_copy(
        update={"evaluate": EvaluateSettings.model_validate({"minimum": minimum})}
    )


def refuse(minimum: dict[str, float], metrics: dict[str, float]) -> str:
    with pytest.raises(PromotionRefused) as caught:
        check_gates(make_recipe(minimum), VERSION, metrics)
    return str(caught.value)


def test_a_version_that_reaches_every_gate_passes() -> None:
    gates = {"digit_accuracy": 0.8, "color_accuracy": 0.9}
    check_gates(make_recipe(gates), VERSION, {"digit_accuracy": 0.8, "color_accuracy": 1.0})
    check_gates(make_recipe({}), VERSION, {})


def test_a_gate_names_its_metric_and_by_how_much_it_was_missed() -> None:
    message = refuse({"digit_accuracy": 0.8}, {"digit_accuracy": 0.7})
    assert "digits version 7 is not promoted" in message
    assert "digit_accuracy = 0.700 is below 0.8 by 0.100" in message
    assert "Train longer, or lower evaluate.minimum" in message


def test_every_missed_gate_is_named_and_no_other() -> None:
    gates = {"digit_accuracy": 0.8, "color_accuracy": 0.9, "relation_accuracy": 0.5}
    found = {"digit_accuracy": 0.1, "color_accuracy": 0.2, "relation_accuracy": 0.6}
    message = refuse(gates, found)
    assert "digit_accuracy = 0.100" in message
    assert "color_accuracy = 0.200" in message
    assert "relation_accuracy" not in message


def test_a_metric_nobody_measured_does_not_pass() -> None:
    message = refuse({"relation_accuracy": 0.5}, {"digit_accuracy": 1.0, "color_accuracy": 1.0})
    assert "relation_accuracy was not measured (it has color_accuracy, digit_accuracy)" in message


def test_a_metric_that_is_not_a_number_does_not_pass() -> None:
    assert "digit_accuracy = nan is below 0.8" in refuse(
        {"digit_accuracy": 0.8}, {"digit_accuracy": float("nan")}
    )
