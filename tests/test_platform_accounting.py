"""What work costs: one short real measurement, and the arithmetic."""

import time

import pytest
from pydantic import ValidationError

from pixart_platform.accounting import AccountingSettings, Cost, measure


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
    assert Cost(1.0, 2.0, 3.0, 4.0).as_metrics() == {
        "cost_seconds": 1.0, "cost_kwh": 2.0, "cost_co2_kg": 3.0, "cost_usd": 4.0,
    }  # fmt: skip


@pytest.mark.parametrize("country", ["us", "usa", "GERMANY", ""])
def test_a_country_is_three_capitals(country: str) -> None:
    with pytest.raises(ValidationError, match="country"):
        AccountingSettings(country=country)
