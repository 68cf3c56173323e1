"""Prompt features, kept: a text encoder costs far more than a lookup, and prompts repeat.

Features depend on the encoder alone, never on the transformer, so they outlive a weight swap. One
lock covers every use of an encoder: a fast tokenizer changes its own settings while it works and
raises "Already borrowed" when two threads meet in it.

Legend: L text tokens, Dt text width.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable

from torch import Tensor

from pixart_models.text import TextEncoder
from pixart_serve.observer import NOBODY, Observer

_CAPACITY = 256  # prompts; T5-XXL's features are about 1 MB each


class PromptFeatures:
    """A least-recently-used cache in front of text encoders."""

    def __init__(self, capacity: int = _CAPACITY, observer: Observer = NOBODY) -> None:
        self._capacity, self._observer = capacity, observer
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Tensor] = OrderedDict()

    def encode(self, encoder: TextEncoder, prompts: Iterable[str]) -> dict[str, Tensor]:
        """Features (L, Dt) of each prompt; those not at hand are encoded in one batch."""
        found: dict[str, Tensor] = {}
        with self._lock:
            missing = []
            for prompt in dict.fromkeys(prompts):
                features = self._kept.get((encoder.digest, prompt))
                if features is None:
                    missing.append(prompt)
                else:
                    self._kept.move_to_end((encoder.digest, prompt))
                    found[prompt] = features
            if missing:
                began = time.monotonic()
                for prompt, features in zip(missing, encoder.encode(missing), strict=True):
                    found[prompt] = self._kept[encoder.digest, prompt] = features
                self._observer.encoded_text(time.monotonic() - began)
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        return found

    def count_tokens(self, encoder: TextEncoder, prompt: str) -> int:
        """Tokens of ``prompt`` with its end mark, before any truncation."""
        with self._lock:
            return encoder.count_tokens(prompt)
