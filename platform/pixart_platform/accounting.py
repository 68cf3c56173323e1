"""What a piece of work cost, and what a forecast takes an accelerator for.

Measured energy is codecarbon's estimate for the whole machine (CPU by its rated power, GPU by its
sensor), offline; carbon uses the recipe's country. An estimate, and labelled so wherever it is
shown. A forecast has no sensor: it takes an accelerator's peak, watts and price from the table
here, which a recipe overrides where its own are known.
"""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

from pydantic import Field, field_validator

from pixart_platform.errors import RecipeError
from pixart_platform.recipe import Section

_log = logging.getLogger(__name__)


@dataclass
class Cost:
    """Totals of a measured block."""

    seconds: float = 0.0
    kwh: float = 0.0
    co2_kg: float = 0.0
    usd: float = 0.0
    gpu_hours: float = 0.0

    def as_metrics(self) -> dict[str, float]:
        return {f"cost_{k}": v for k, v in vars(self).items()}


Share = Annotated[float, Field(gt=0, le=1)]


class Accelerator(Section):
    """One GPU, or one worker's share of a CPU, as a forecast sees it."""

    tflops: float = Field(gt=0)
    """Peak of dense products: bf16, on a CPU fp32; in 10^12 FLOPs a second."""
    memory_gib: float = Field(gt=0)
    """What a process can have of its memory."""
    watts: float = Field(ge=0)
    """Under load, with its share of the host and of cooling."""
    usd_per_hour: float = Field(ge=0)
    mfu: Share | Annotated[dict[int, Share], Field(min_length=1)]
    """Share of the peak that training runs at, recomputed FLOPs counted; one, or by resolution:
    that of the largest side not above a stage's holds."""
    step_seconds: float = Field(0.0, ge=0)
    """What each step takes beside its FLOPs."""
    start_seconds: float = Field(120.0, ge=0)
    """From a job's start to its first step, and from its last step to its end."""

    def mfu_at(self, resolution: int) -> float:
        if isinstance(self.mfu, float):
            return self.mfu
        return self.mfu[max((r for r in self.mfu if r <= resolution), default=min(self.mfu))]


# Peaks without sparsity and boards' watts are the vendor's; watts are half as much again for host
# and cooling (eight A100 in a DGX draw 6.5 kW at most, 812 W each). Utilisation is assumed, not
# measured: 25 % is what PixArt-alpha's stages at 256 px and MosaicML's SD2 ran at. Prices: A100 and
# H200 as MosaicML and Photoroom told, H100 MicroDiT's $1,890 / 499 h, others about a cloud's list.
# CPU: one of two shared cores, which gave 40 to 60 GFLOP/s; with two workers of the demo a step
# took 0.27 to 0.8 s, a stage's start and end 25 to 45 s, as other work let it; codecarbon's watts.
ACCELERATORS: dict[str, Accelerator] = {
    name: Accelerator(tflops=tflops, memory_gib=gib, watts=watts, usd_per_hour=usd, mfu=0.25)
    for name, tflops, gib, watts, usd in (
        ("a100-40g", 312, 39.4, 600, 1.60),
        ("a100-80g", 312, 79.1, 600, 2.00),
        ("h100-80g", 989, 79.1, 1050, 3.79),
        ("h200", 989, 139.8, 1050, 2.00),
        ("a10g", 70, 22.0, 450, 1.00),
        ("l4", 121, 22.0, 110, 0.80),
    )
} | {
    "cpu": Accelerator(
        tflops=0.1, memory_gib=3, watts=14, usd_per_hour=0, mfu=0.6, step_seconds=0.035,
        start_seconds=30,
    )
}  # fmt: skip


class AccountingSettings(Section):
    """Prices and place."""

    country: str = Field("USA", pattern="^[A-Z]{3}$")
    """ISO 3166 alpha-3 code whose electricity mix is assumed."""
    usd_per_hour: float = Field(0.0, ge=0)
    """Price of the machines a pipeline occupies; of jobs on GPUs, the accelerator's counts."""
    accelerator: str = "a100-80g"
    """What GPUs are charged as, where a recipe uses them; its price and watts are below."""
    accelerators: dict[str, Accelerator] = Field(default_factory=dict)
    """What a forecast takes an accelerator for: of one it knows, only what differs; another, whole.
    """

    @field_validator("accelerators", mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Fill in what the table knows."""
        if not isinstance(given, dict):
            return given
        known = {name: kind.model_dump() for name, kind in ACCELERATORS.items()}
        return {n: known.get(n, {}) | v if isinstance(v, dict) else v for n, v in given.items()}

    def find_accelerator(self, name: str) -> Accelerator:
        """Raises RecipeError for one that neither the recipe nor the table knows."""
        known = ACCELERATORS | self.accelerators
        if name not in known:
            raise RecipeError(
                f"accelerator {name!r} is unknown; one of {', '.join(known)}, or describe it under "
                f"accounting.accelerators"
            )
        return known[name]

    def charge(self, kind: Accelerator, seconds: float, number: float) -> Cost:
        """What so many accelerators cost for so long."""
        hours = seconds * number / 3600
        kwh = hours * kind.watts / 1000
        co2_kg = kwh * carbon_intensity(self.country)
        return Cost(seconds, kwh, co2_kg, hours * kind.usd_per_hour, hours)


def recognise(device_name: str) -> Accelerator | None:
    """The accelerator of CUDA's ``device_name``, as ``NVIDIA A100-SXM4-80GB``, if it is known."""
    for name, kind in ACCELERATORS.items():
        if all(re.search(rf"\b{part}b?\b", device_name.lower()) for part in name.split("-")):
            return kind
    return None


@lru_cache
def carbon_intensity(country: str) -> float:
    """kg CO2 of a kWh, from codecarbon's table. Raises RecipeError."""
    from codecarbon.input import DataSource

    mix = DataSource().get_global_energy_mix_data()
    if country not in mix:
        raise RecipeError(
            f"accounting.country = {country!r}: its electricity mix is unknown; write an ISO 3166 "
            f"alpha-3 code, as FRA"
        )
    return float(mix[country]["carbon_intensity"]) / 1000


@contextmanager
def measure(settings: AccountingSettings, num_gpus: float = 0) -> Iterator[Cost]:
    """Fills the yielded Cost when the block ends.

    Of ``num_gpus``, on whichever machines, time is measured and the rest charged by the table.
    """
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
        if found := getattr(tracker, "final_emissions_data", None):
            cost.kwh = float(found.energy_consumed)
        else:  # codecarbon says nothing of its own failures; no work is lost for an estimate
            _log.warning("the energy of %.0f s of work is not known, and counted as none",
                         time.monotonic() - started)  # fmt: skip
        cost.seconds = time.monotonic() - started
        cost.usd = cost.seconds / 3600 * settings.usd_per_hour
        if num_gpus:
            kind = settings.find_accelerator(settings.accelerator)
            vars(cost).update(vars(settings.charge(kind, cost.seconds, num_gpus)))
