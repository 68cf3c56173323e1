"""Text encoders: a transformers T5 from a local folder or hub id, or the demo's built-in tiny one.

Features leave here trimmed to the caption's true length: padding is never stored, sent or
attended to. How any published model is found on disk or on the hub is here too (``find_model``):
its files are checked before they are loaded, so that what is missing has a name.

Legend: L text tokens, Dt text feature width.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pixart_models.config import ModelInputError
from pixart_models.digits import COLORS, DIGIT_NAMES, RELATIONS, Reading, describe

BUILTIN = "builtin:t5-tiny"
TINY_WIDTH = 64
_SEED = 11
_ORDER_GAIN = 24.0  # gives position biases a standard deviation of 3 before the softmax
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}


class ModelNotFound(ModelInputError):
    """A model that cannot be loaded here: what is missing and the way out, in one line."""

    def __init__(self, kind: str, source: str, why: object) -> None:
        reason = (str(why).strip() or type(why).__name__).splitlines()[0]
        super().__init__(f"cannot load the {kind} {source!r}: {reason}")


@dataclass(frozen=True)
class ModelSpec:
    """What a kind of model looks like on disk."""

    kind: str
    """As errors call it."""
    loader: str
    """The library's class, which also converts pickled weights."""
    part: str = ""
    """Its subfolder in a diffusers pipeline; empty when it is in none."""
    stem: str = "model"
    """Its weights are STEM.safetensors, or shards that STEM.safetensors.index.json lists."""
    mark: tuple[str, str] | None = None
    """A key of its config.json, and the value that tells it from other models."""
    others: tuple[str, ...] = ()
    """Patterns of further files it needs."""
    built_in: str = "1"
    """The revision of those that are built in."""


class ModelFiles(NamedTuple):
    """A model on this machine: ``folder`` holds its config and weights, ``root`` is what the source
    names: the same folder, or the pipeline around it."""

    root: Path
    folder: Path
    weights: tuple[Path, ...]


_TOKENIZER = ("tokenizer.json", "spiece.model", "*_config.json", "*tokens*.json")
T5 = ModelSpec(
    "text encoder", "T5EncoderModel", part="text_encoder", mark=("model_type", "t5"),
    others=(*_TOKENIZER, *(f"tokenizer/{name}" for name in _TOKENIZER)),
)  # fmt: skip


def find_model(spec: ModelSpec, source: str) -> ModelFiles:
    """Find a model by local folder or hub id, alone or in a diffusers pipeline; check its files.

    Of a hub id only the files needed are downloaded, into the hub's cache; with HF_HUB_OFFLINE=1
    the cache alone is looked at. Raises ModelNotFound.
    """
    local = Path(source).expanduser()
    configs = ["config.json", *([f"{spec.part}/config.json"] if spec.part else [])]
    root = local if local.is_dir() else download(spec, source, configs)
    part = "" if (root / "config.json").is_file() or not spec.part else f"{spec.part}/"
    if root != local:
        weights = (f"{spec.stem}{end}" for end in (".safetensors*", "-0*.safetensors"))
        wanted = [part + name for name in ("config.json", *weights)]
        root = download(spec, source, [*wanted, *spec.others])
    folder = root / part
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            spec.kind, source, f"{root} holds no {' nor '.join(configs)}; "
            f"give the folder that 'hf download' or save_pretrained wrote",
        )  # fmt: skip
    if spec.mark:
        key, value = spec.mark
        found = _read_json(spec, source, folder / "config.json").get(key)
        if found != value:
            raise ModelNotFound(
                spec.kind, source, f"{folder} holds a {found!r}, but a {value!r} is needed"
            )
    return ModelFiles(root, folder, _list_weights(spec, source, folder))


def download(spec: ModelSpec, source: str, patterns: list[str]) -> Path:
    """The hub's ``source`` in the local cache, with the files of these patterns."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except HFValidationError as error:
        why = "there is no such folder, and it is no hub id; give a local folder or ORG/NAME"
        raise ModelNotFound(spec.kind, source, why) from error
    except LocalEntryNotFoundError as error:
        why = (
            f"there is no such folder, the hub's cache lacks it and the hub is out of reach or "
            f"HF_HUB_OFFLINE is set; 'hf download {source}' fetches it where there is a network, "
            f"or give a local folder"
        )
        raise ModelNotFound(spec.kind, source, why) from error
    except OSError as error:
        why = (
            f"there is no such folder, and the hub refuses it ({type(error).__name__}); check the "
            f"id, and for a gated or private one accept its terms and set HF_TOKEN"
        )
        raise ModelNotFound(spec.kind, source, why) from error


def _list_weights(spec: ModelSpec, source: str, folder: Path) -> tuple[Path, ...]:
    """The safetensors files, all of them there. Raises ModelNotFound."""
    whole = folder / f"{spec.stem}.safetensors"
    index = folder / f"{whole.name}.index.json"
    if whole.is_file():
        return (whole,)
    if index.is_file():
        shards = _read_json(spec, source, index).get("weight_map", {}).values()
        paths = sorted({folder / name for name in shards})
        lost = [path.name for path in paths if not path.is_file()]
        if paths and not lost:
            return tuple(paths)
        why = f"{folder} lacks {len(lost)} of {len(paths)} shards, first {lost[:1]}; fetch it again"
        raise ModelNotFound(spec.kind, source, why)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    why = (
        f"{folder} holds {f'only {pickles[0]}, ' if pickles else ''}no {whole.name}; fetch it "
        f"again, or convert pickled weights, which are never loaded, once where you trust them: "
        f"{spec.loader}.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW)"
    )
    raise ModelNotFound(spec.kind, source, why)


def _read_json(spec: ModelSpec, source: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelNotFound(spec.kind, source, f"{path} is damaged ({error})") from error
    return found if isinstance(found, dict) else {}


@contextmanager
def explain_failure(spec: ModelSpec, source: str) -> Iterator[None]:
    """Turn what libraries raise on damaged or foreign files into ModelNotFound."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        why = f"its weights are damaged ({error}); fetch it again"
        raise ModelNotFound(spec.kind, source, why) from error
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelNotFound(spec.kind, source, error) from error


def require_all_weights(spec: ModelSpec, source: str, report: dict[str, Any]) -> None:
    """Raise ModelNotFound when tensors are missing: libraries fill them with random numbers.

    ``report`` is from_pretrained's output_loading_info, with ignore_mismatched_sizes=True.
    """
    names = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
    if names:
        why = f"{len(names)} tensors are missing or mis-shaped, first {names[0]}; fetch it again"
        raise ModelNotFound(spec.kind, source, why)


@dataclass
class TextEncoder:
    """A frozen encoder with its tokenizer."""

    source: str
    model: Any
    tokenizer: Any
    max_tokens: int
    weights: tuple[Path, ...] = ()
    """The files it was loaded from; none when it was built here."""

    @cached_property
    def digest(self) -> str:
        """16 hex digits that identify vocabulary and weights.

        Of the weights' files, so it is the same in any precision and on any device; T5-XXL's 19 GB
        take up to 20 seconds, and only who asks pays.
        """
        digest = hashlib.sha256()
        for word, index in sorted(self.tokenizer.get_vocab().items()):
            digest.update(f"{word}\0{index}\n".encode())
        if self.weights:
            with ThreadPoolExecutor(len(self.weights)) as pool:
                for found in pool.map(_hash_file, self.weights):
                    digest.update(found)
        else:
            hash_tensors(digest, self.model)
        return digest.hexdigest()[:16]

    @property
    def width(self) -> int:
        return int(self.model.config.d_model)

    def count_tokens(self, prompt: str) -> int:
        """Tokens of ``prompt`` including the end mark, before any truncation."""
        return len(self.tokenizer(prompt)["input_ids"])

    def group_by_length(self, prompts: Sequence[str], batch_size: int) -> list[list[int]]:
        """Batches of places in ``prompts``, like lengths together and the longest first.

        In batches as they come most of T5's work is padding: captions differ much in length.
        """
        lengths = [self.count_tokens(prompt) for prompt in prompts]
        places = sorted(range(len(prompts)), key=lambda i: -lengths[i])
        return [places[i : i + batch_size] for i in range(0, len(places), batch_size)]

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


def load_text_encoder(
    source: str, max_tokens: int, device: str = "cpu", *, eight_bit: bool = False
) -> TextEncoder:
    """Load ``builtin:t5-tiny``, or a T5 (or its pipeline) by local folder or hub id.

    fp32 on CPU and bf16 elsewhere, never fp16: T5's activations overflow it and come out NaN.
    ``eight_bit`` keeps most weights of a T5 as int8 (bitsandbytes, CUDA only), in a little over
    half of bf16's memory. Raises ModelNotFound.
    """
    weights: tuple[Path, ...] = ()
    if source == BUILTIN:
        model, tokenizer = _build_tiny()
        model = model.to(device)
    else:
        files = find_model(T5, source)
        model, tokenizer = _load_t5(source, files, device, eight_bit)
        weights = files.weights
    model.eval().requires_grad_(False)
    return TextEncoder(source, model, tokenizer, max_tokens, weights)


def _load_t5(source: str, files: ModelFiles, device: str, eight_bit: bool) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, BitsAndBytesConfig, T5EncoderModel

    options: dict[str, Any] = {"dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    if eight_bit:
        _check_eight_bit(source, device)
        quantized = BitsAndBytesConfig(load_in_8bit=True)
        options |= {"quantization_config": quantized, "device_map": {"": device}}
    folder = _find_tokenizer(source, files)
    with explain_failure(T5, source):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, report = T5EncoderModel.from_pretrained(
            files.folder, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    require_all_weights(T5, source, report)
    return model if eight_bit else model.to(device), tokenizer


def _find_tokenizer(source: str, files: ModelFiles) -> Path:
    for folder in (files.folder, files.root / "tokenizer"):
        if (folder / "tokenizer.json").is_file():
            return folder
        if (folder / "spiece.model").is_file():
            if find_spec("sentencepiece"):
                return folder
            why = f"{folder}/spiece.model needs a package to be read: 'pip install sentencepiece'"
            raise ModelNotFound(T5.kind, source, why)
    why = (
        f"{files.root} holds no tokenizer (tokenizer.json or spiece.model), beside the weights or "
        f"in tokenizer/; copy it there, or give the whole pipeline's folder"
    )
    raise ModelNotFound(T5.kind, source, why)


def _check_eight_bit(source: str, device: str) -> None:
    lacking = [name for name in ("bitsandbytes", "accelerate") if not find_spec(name)]
    if not device.startswith("cuda"):
        lacking.insert(0, f"a CUDA device (not {device!r})")
    if lacking:
        why = (
            f"8-bit weights need {', '.join(lacking)}; pip install 'pixart-ray[int8]' on a "
            f"machine with an NVIDIA GPU, or leave text_encoder_8bit off"
        )
        raise ModelNotFound(T5.kind, source, why)


def hash_tensors(digest: "hashlib._Hash", model: nn.Module) -> None:
    """Feed names and bytes of a model's tensors, one tensor at a time, in any precision."""
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())


def _hash_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


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
