"""The only file that knows DeepSpeed: ZeRO sharding, the optimizer step, collective means.

A torch optimizer is passed in, so nothing is compiled at start. Of DeepSpeed's checkpoints nothing
is used: they are pickles, bound to a world size (its issues #2898, #6441), and stage 2 is outside
its universal ones. Instead ``fragments`` names, for ZeRO 0 to 3 alike, which values of which
parameter this rank holds in fp32, as views to save from and to restore into.
"""

import os
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pixart_platform.optimizer import KINDS, AveragingAdamW, OptimizerSettings

WEIGHT = "weight"  # the kind of the masters themselves, beside the optimizer's KINDS
ZeroStage = Literal[0, 1, 2, 3]


class Fragment(NamedTuple):
    """Consecutive values of one flattened parameter: fp32 views by kind, alike in length."""

    parameter: str
    start: int
    views: dict[str, Tensor]

    def part(self, begin: int, end: int) -> "Fragment":
        """The values from ``begin`` to ``end`` of this fragment."""
        return Fragment(
            self.parameter, self.start + begin, {k: v[begin:end] for k, v in self.views.items()}
        )


class Engine:
    """One worker's view of the sharded model. Construct it on every rank of a process group."""

    def __init__(
        self,
        network: nn.Module,
        settings: OptimizerSettings,
        *,
        zero_stage: ZeroStage,
        accumulate: int,
        device: torch.device,
    ) -> None:
        """``network`` has its first weights, in fp32; a step follows ``accumulate`` backwards."""
        import deepspeed

        on_gpu = device.type == "cuda"
        if not on_gpu:
            # Its shared-memory all-reduce costs a minute of g++ at first use and serves inference
            # only; gloo does our reductions.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._optimizer = AveragingAdamW(network.parameters(), settings, clips=zero_stage == 0)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # only counts; slices may differ by an image
            "gradient_accumulation_steps": accumulate,
            "gradient_clipping": settings.gradient_clip if zero_stage else 0.0,
            "zero_optimization": {
                "stage": zero_stage,
                "overlap_comm": on_gpu,
                # gloo sums whole gradients faster than parts: 331 against 366 ms a step of two
                # workers with the digits network under ZeRO 2.
                "reduce_scatter": on_gpu,
                "contiguous_gradients": on_gpu,
            },
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": on_gpu},  # this project's CPUs are faster in fp32
            "steps_per_print": 10**9,
        }
        exact = (
            {n: p.detach().cpu().clone() for n, p in network.named_parameters()} if on_gpu else {}
        )
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=network, optimizer=self._optimizer, config=config
        )
        self.device, self.zero_stage = device, zero_stage
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self._set_masters(exact)
        for flat in self._masters():
            self._optimizer.prepare(flat)

    @torch.no_grad()
    def _set_masters(self, exact: dict[str, Tensor]) -> None:
        """DeepSpeed makes the masters from weights that it has rounded to bf16; undo that."""
        for name, start, flat, begin, length in self._layout() if exact else ():
            flat[begin : begin + length].copy_(exact[name].view(-1)[start : start + length])

    @property
    def module(self) -> nn.Module:
        """Call this to run the forward pass that ``step`` will differentiate."""
        wrapped: nn.Module = self._engine
        return wrapped

    def set_rates(self, learning_rate: float, average_share: float) -> None:
        """Of the next step; the average moves by ``average_share`` of the way to the weights."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.average_share = average_share

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        """Call after every backward; the last of ``accumulate`` moves the weights."""
        self._engine.step()

    def gradient_norm(self) -> float:
        """Global norm before clipping, of the last step; not finite if that was not taken."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def sum(self, values: Tensor) -> list[float]:
        """Sums over ranks of a few values, equal on all of them."""
        total = values.detach().float()
        torch.distributed.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def set_num_steps(self, num_steps: int) -> None:
        """Steps taken before now, for Adam's bias correction."""
        for flat in self._masters():
            self._optimizer.prepare(flat, num_steps)

    def fragments(self, *, share: bool) -> Iterator[Fragment]:
        """What this rank holds. With ``share``, of what all hold (ZeRO 0) only its part."""
        for name, start, flat, begin, length in self._layout():
            states = self._optimizer.state[flat]
            whole = {WEIGHT: flat.detach()} | {kind: states[kind] for kind in KINDS}
            views = {k: v.view(-1)[begin : begin + length] for k, v in whole.items()}
            fragment = Fragment(name, start, views)
            if share and self.zero_stage == 0:
                first, last = (length * r // self.world_size for r in (self.rank, self.rank + 1))
                fragment = fragment.part(first, last)
            yield fragment

    def _masters(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer steps."""
        if self.zero_stage == 0:
            return list(self._engine.module.parameters())
        sharded = self._engine.optimizer
        if self.zero_stage == 3:
            return list(sharded.fp32_partitioned_groups_flat)
        return list(sharded.single_partition_of_fp32_groups)

    def _layout(self) -> Iterator[tuple[str, int, Tensor, int, int]]:
        """(parameter, start in it, master tensor, start in that, length) of all this rank holds."""
        sharded, masters = self._engine.optimizer, self._masters()
        for name, parameter in self._engine.module.named_parameters():
            if self.zero_stage == 0:
                yield name, 0, parameter, 0, parameter.numel()
            elif self.zero_stage == 3:
                group, begin, size = sharded.grad_position[sharded.get_param_id(parameter)]
                start = self.rank * size  # all ranks' partitions are as long, the last is padded
                if (length := min(size, parameter.ds_numel - start)) > 0:
                    yield name, start, masters[group], begin, length
            elif (mapped := parameter._hp_mapping) is not None:
                ours, theirs = mapped.lp_fragment_address, mapped.hp_fragment_address
                yield name, ours.start, masters[mapped.param_group_index], theirs.start, ours.numel


def choose_accelerator() -> torch.device:
    """The accelerator Ray gave this worker, or the CPU; call before DeepSpeed is imported."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return torch.device("cpu")
