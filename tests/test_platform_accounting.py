"""What work costs: one short real measurement, the arithmetic, and what a forecast assumes."""

import time

import pytest
from pydantic import ValidationError

from pixart_platform.accounting import (
    ACCELERATORS,
    AccountingSettings,
    Cost,
    carbon_intensity,
    measure,
    recognise,
)
from pixart_platform.errors import RecipeError


def test_a_measured_block_is_charged_even_when_it_fails() -> None:
    settings = AccountingSettings(country="FRA", usd_per_hour=36.0)

    kept: list[Cost] = []

    def work() -> None:
        with measure(settings) as cost:
            kept.append(cost)
            time.sleep(0.3)
            raise KeyError("the work itself failed")

    with pytest.raises(KeyError):
        work()
    (cost,) = kept
    assert 0.3 <= cost.seconds < 30
    assert 0 < cost.kwh < 0.1
    assert 0 < cost.co2_kg < cost.kwh, "no grid emits a kilogram a kilowatt-hour"
    assert cost.usd == pytest.approx(cost.seconds * 0.01)


def test_costs_become_metrics_by_name() -> None:
    assert Cost(1.0, 2.0, 3.0, 4.0, 5.0).as_metrics() == {
        "cost_seconds": 1.0, "cost_kwh": 2.0, "cost_co2_kg": 3.0, "cost_usd": 4.0,
        "cost_gpu_hours": 5.0,
    }  # fmt: skip


def test_work_on_gpus_is_charged_by_the_table_for_the_time_it_took() -> None:
    settings = AccountingSettings(country="FRA", usd_per_hour=1000, accelerator="h100-80g")
    with measure(settings, num_gpus=16) as cost:
        time.sleep(0.1)
    assert cost == settings.charge(ACCELERATORS["h100-80g"], cost.seconds, 16)
    assert cost.gpu_hours == pytest.approx(16 * cost.seconds / 3600)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80g"), ("NVIDIA A100-PCIE-40GB", "a100-40g"),
        ("NVIDIA H100 80GB HBM3", "h100-80g"), ("NVIDIA H200", "h200"), ("NVIDIA A10G", "a10g"),
        ("NVIDIA L4", "l4"), ("NVIDIA L40S", ""), ("NVIDIA A10", ""), ("Tesla V100-SXM2-32GB", ""),
    ],
)  # fmt: skip
def test_a_gpu_is_recognised_by_the_name_cuda_gives_it(device: str, name: str) -> None:
    assert recognise(device) == ACCELERATORS.get(name)


@pytest.mark.parametrize("country", ["us", "usa", "GERMANY", ""])
def test_a_country_is_three_capitals(country: str) -> None:
    with pytest.raises(ValidationError, match="country"):
        AccountingSettings(country=country)


def test_a_recipe_overrides_only_what_it_names() -> None:
    given = {"a100-80g": {"usd_per_hour": 1.5, "mfu": {256: 0.3, 512: 0.4}}}
    kind = AccountingSettings.model_validate({"accelerators": given}).find_accelerator("a100-80g")
    assert kind.usd_per_hour == 1.5
    assert kind.watts == ACCELERATORS["a100-80g"].watts
    assert [kind.mfu_at(side) for side in (128, 256, 511, 512, 1024)] == [0.3, 0.3, 0.3, 0.4, 0.4]


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"a100-80g": {"mfu": 1.2}}, "a100-80g.mfu"),
        ({"a100-80g": {"mfu": {}}}, "a100-80g.mfu"),
        ({"a100-80g": {"price": 2}}, "a100-80g.price"),
        ({"b200": {"tflops": 2250}}, "b200.watts"),
        ({"l4": 3}, "l4"),
        (3, "accelerators"),
    ],
)
def test_an_accelerator_is_described_whole_and_in_range(given: object, place: str) -> None:
    with pytest.raises(ValidationError, match=place):
        AccountingSettings.model_validate({"accelerators": given})


def test_an_unknown_accelerator_is_told_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"'v100' is unknown; one of a100-40g, .*cpu"):
        AccountingSettings().find_accelerator("v100")


def test_accelerators_are_charged_by_the_hour() -> None:
    settings = AccountingSettings(country="FRA")
    cost = settings.charge(ACCELERATORS["a100-80g"], 7200, 8)
    assert (cost.seconds, cost.usd) == (7200, 32)
    assert cost.kwh == pytest.approx(9.6)
    assert cost.co2_kg == pytest.approx(9.6 * carbon_intensity("FRA"))
    assert carbon_intensity("FRA") < carbon_intensity("USA") / 3


def test_a_country_without_a_mix_is_named() -> None:
    with pytest.raises(RecipeError, match="country = 'QQQ'"):
        carbon_intensity("QQQ")
