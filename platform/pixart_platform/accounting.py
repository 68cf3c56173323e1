"""What a piece of work cost: seconds, kWh, kg CO2 and dollars.

Energy is codecarbon's estimate for the whole machine (CPU by its rated power, GPU by its sensor),
offline; carbon uses the recipe's country. An estimate, and labelled so wherever it is shown.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic import Field

from pixart_platform.recipe import Section


class AccountingSettings(Section):
    """Prices and place."""

    country: str = Field("USA", pattern="^[A-Z]{3}$")
    """ISO 3166 alpha-3 code whose electricity mix is assumed."""
    usd_per_hour: float = Field(0.0, ge=0)
    """Price of the machines a pipeline occupies."""


@dataclass
class Cost:
    """Totals of a measured block."""

    seconds: float = 0.0
    kwh: float = 0.0
    co2_kg: float = 0.0
    usd: float = 0.0

    def as_metrics(self) -> dict[str, float]:
        return {f"cost_{k}": v for k, v in vars(self).items()}


@contextmanager
def measure(settings: AccountingSettings) -> Iterator[Cost]:
    """Fills the yielded Cost when the block ends."""
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # its import sets INFO
    cost = Cost()
    tracker = OfflineEmissionsTracker(
        country_iso_code=settings.country, save_to_file=False, log_level="critical",
        allow_multiple_runs=True, measure_power_secs=5,
    )  # fmt: skip
    started = time.monotonic()
    tracker.start()
    try:
        yield cost
    finally:
        cost.co2_kg = float(tracker.stop() or 0.0)
        cost.kwh = float(tracker.final_emissions_data.energy_consumed)
        cost.seconds = time.monotonic() - started
        cost.usd = cost.seconds / 3600 * settings.usd_per_hour
