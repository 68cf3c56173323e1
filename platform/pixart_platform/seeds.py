"""Random draws that do not depend on who makes them.

A sample's noise, timestep and caption drop come from a seed that is a function of (run seed, its
position in the run), so a run's result is the same on any number of workers and after any resume.
"""

import hashlib

import torch
from torch import Tensor

_MASK = (1 << 63) - 1


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from integers and names; different parts give unrelated seeds."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") & _MASK


class SampleDraws:
    """The random numbers of a list of samples, one generator each, drawn in a fixed sequence.

    ``positions`` are the samples' places in the run, counted in images.
    """

    def __init__(self, run_seed: int, positions: list[int]) -> None:
        self.positions = positions
        self._generators = [
            torch.Generator().manual_seed(derive_seed(run_seed, p)) for p in positions
        ]

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) standard normal, fp32, on the CPU."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators])

    def uniform(self) -> Tensor:
        """(B,) in [0, 1)."""
        return torch.cat([torch.rand(1, generator=g) for g in self._generators])
