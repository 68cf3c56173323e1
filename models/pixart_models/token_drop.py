"""Training on a part of the tokens: deferred masking and token routing, one mechanism.

At block ``start`` only a random share of the tokens goes on. *Masking* (deferred: MicroDiT, Sehwag
et al. 2024, arXiv 2407.15811) never brings the others back and takes the loss on the kept ones;
the blocks before ``start`` see all tokens and play the patch mixer, so the network stays the
published one and its finish on all tokens needs no surgery. *Routing* (TREAD, Krause et al. 2025,
arXiv 2501.04765) lets the others skip the blocks up to ``stop`` and rejoin there.

Both are for training only: pictures are always drawn with all tokens.

Legend: B batch, N image tokens, K kept ones, D width, C latent channels, H, W latent size, p patch.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pixart_models.config import ConfigError


class Route(NamedTuple):
    """Which tokens go through blocks ``start`` <= i < ``stop``: ``kept`` (B, K) int64, ascending.

    Without ``stop`` the others never come back, and the output has the kept ones only.
    """

    kept: Tensor
    start: int
    stop: int | None


@dataclass(frozen=True)
class TokenDrop:
    """A way to drop ``share`` (0-1, exclusive) of the tokens of a network with ``depth`` blocks.

    The first ``start`` blocks see all tokens; when routing, so do the last ``end``. The papers use
    share 0.75 for masking, and share 0.5, start 2, end 1 for routing. Raises ConfigError.
    """

    mode: Literal["mask", "route"]
    share: float
    start: int
    end: int
    depth: int

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"token_drop.share = {self.share}: must be above 0 and below 1")
        ends = {"start": self.start} | ({"end": self.end} if self.mode == "route" else {})
        if min(ends.values()) < 1 or sum(ends.values()) >= self.depth:
            raise ConfigError(
                f"token_drop.{', '.join(f'{k} = {v}' for k, v in ends.items())}: each must be at "
                f"least 1 and leave one of the network's {self.depth} blocks for a part of tokens"
            )

    def check_tokens(self, num_tokens: int) -> None:
        """Raise ConfigError unless some of ``num_tokens`` are kept and some are not."""
        if not 0 < (kept := round(num_tokens * (1 - self.share))) < num_tokens:
            raise ConfigError(
                f"token_drop.share = {self.share}: keeps {kept} of the {num_tokens} tokens of a "
                f"picture; choose a share nearer to 0.5, or drop no tokens of pictures so small"
            )

    def choose(self, noise: Tensor) -> Route:
        """Keep the tokens with the smallest noise (B, N), some but not all; any i.i.d. draws do."""
        num_tokens = noise.shape[1]
        num_kept = max(1, min(round(num_tokens * (1 - self.share)), num_tokens - 1))
        kept = noise.argsort(dim=1)[:, :num_kept].sort(dim=1).values
        return Route(kept, self.start, self.depth - self.end if self.mode == "route" else None)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    conditions: tuple[Any, ...],
    route: Route | None,
    recompute: bool,
) -> Tensor:
    """Tokens x (B, N, D) through all blocks: (B, N, D), or (B, K, D) of a masking route.

    ``recompute`` keeps only each block's input and runs it again in backward: about a third more
    time for a fraction of the memory (Chen et al. 2016, arXiv 1604.06174).
    """
    whole = x
    for i, block in enumerate(blocks):
        if route and i == route.start:
            whole, x = x, take(x, route.kept)
        if route and i == route.stop:
            x = put_back(whole, x, route.kept)
        x = (
            checkpoint(block, x, *conditions, use_reentrant=False)
            if recompute
            else block(x, *conditions)
        )
    return x


def take(x: Tensor, kept: Tensor) -> Tensor:
    """Tokens (B, N, D) at ``kept`` (B, K) -> (B, K, D)."""
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))


def put_back(whole: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    """Tokens ``whole`` (B, N, D) with those at ``kept`` replaced by x (B, K, D)."""
    return whole.scatter(1, kept[..., None].expand_as(x), x)


def take_patches(latents: Tensor, kept: Tensor, patch: int) -> Tensor:
    """The kept patches of latents (B, C, H, W), one above the other: (B, C, K * p, p).

    The layout of a masked network's output, so that any objective is computed on kept tokens only.
    """
    batch, channels, height, width = latents.shape
    grid = latents.view(batch, channels, height // patch, patch, width // patch, patch)
    tokens = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)
    patches = take(tokens, kept).view(batch, -1, channels, patch, patch)  # (B, K, C, p, p)
    return patches.transpose(1, 2).reshape(batch, channels, -1, patch)
