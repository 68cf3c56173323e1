"""Text encoders: a transformers T5 from a local folder or hub id, or the demo's built-in tiny one.

Features leave here trimmed to the caption's true length: padding is never stored, sent or
attended to.

Legend: L text tokens, Dt text feature width.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart_models.digits import COLORS, DIGIT_NAMES, RELATIONS, Reading, describe
from pixart_models.errors import ModelInputError

BUILTIN = "builtin:t5-tiny"
TINY_WIDTH = 64
_SEED = 11
_ORDER_GAIN = 24.0  # gives position biases a standard deviation of 3 before the softmax


class ModelNotFound(ModelInputError):
    """A model that is neither a local folder nor downloadable here."""

    def __init__(self, kind: str, source: str, why: object) -> None:
        super().__init__(
            f"cannot load the {kind} {source!r}: give a local folder, or a hub id where downloads "
            f"are possible ('hf download {source}' fetches it). Reason: {why}"
        )


@dataclass
class TextEncoder:
    """A frozen encoder with its tokenizer. ``digest`` identifies weights and vocabulary."""

    source: str
    model: Any
    tokenizer: Any
    max_tokens: int
    digest: str

    @property
    def width(self) -> int:
        return int(self.model.config.d_model)

    def count_tokens(self, prompt: str) -> int:
        """Tokens of ``prompt`` including the end mark, before any truncation."""
        return len(self.tokenizer(prompt)["input_ids"])

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features of each prompt, (L_i, Dt), trimmed to its true length (1..max_tokens).

        Prompts are encoded in one padded batch; callers choose the batch.
        """
        device = self.model.device
        batch = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.max_tokens,
            return_tensors="pt",
        ).to(device)  # fmt: skip
        mask = batch["attention_mask"]
        hidden = self.model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        lengths = mask.sum(dim=1).tolist()
        return [row[:n].clone() for row, n in zip(hidden, lengths, strict=True)]


def load_text_encoder(source: str, max_tokens: int, device: str = "cpu") -> TextEncoder:
    """Load ``builtin:t5-tiny``, a local folder or a hub id. Raises ModelNotFound."""
    if source == BUILTIN:
        model, tokenizer = _build_tiny()
    else:
        from transformers import AutoTokenizer, T5EncoderModel

        dtype = torch.bfloat16 if device != "cpu" else torch.float32
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = T5EncoderModel.from_pretrained(source, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ModelNotFound("text encoder", source, str(error).splitlines()[0]) from error
    model = model.to(device).eval().requires_grad_(False)
    return TextEncoder(source, model, tokenizer, max_tokens, _digest(model, tokenizer))


def pad_features(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (L_i, Dt) -> features (B, L, Dt) zero-padded and mask (B, L) bool."""
    longest = max(len(f) for f in features)
    padded = features[0].new_zeros(len(features), longest, features[0].shape[1])
    mask = torch.zeros(len(features), longest, dtype=torch.bool, device=features[0].device)
    for i, feature in enumerate(features):
        padded[i, : len(feature)] = feature
        mask[i, : len(feature)] = True
    return padded, mask


def _digest(model: Any, tokenizer: Any) -> str:
    """First 16 hex digits of a SHA-256 over the vocabulary and the weights' bytes."""
    digest = hashlib.sha256()
    for word, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{word}\0{index}\n".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _corpus() -> list[str]:
    """Captions the tiny vocabulary is learned from; bytes cover every other text."""
    singles = [describe(Reading((d,), (c,))) for d, c in product(range(10), COLORS)]
    pairs = [
        describe(Reading((d, 9 - d), (c, "red"), relation))
        for d, c, relation in product(range(10), COLORS, RELATIONS)
    ]
    return [*singles, *pairs, " ".join(DIGIT_NAMES), "a picture of the number and digit scan"]


def _build_tiny() -> tuple[Any, Any]:
    """A two-layer T5 encoder with seeded random weights and a byte-level BPE tokenizer.

    Random but frozen features are enough for the demo's few hundred words; nothing is downloaded.
    The relative position biases are widened: at T5's own scale random attention is nearly blind
    to word order, so "a red three above a blue one" could not be told from its colours swapped
    (digit accuracy stayed at 19 % after 500 steps).
    """
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<pad>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(_corpus(), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", bpe.token_to_id("</s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>")
    config = T5Config(
        vocab_size=512, d_model=TINY_WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=8,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = T5EncoderModel(config)
    position_bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    position_bias.weight.data.mul_(_ORDER_GAIN)
    return model, tokenizer


def is_local(source: str) -> bool:
    return source.startswith("builtin:") or Path(source).is_dir()
