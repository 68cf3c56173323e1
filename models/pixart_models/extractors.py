"""Feature extractors: pictures -> vectors, whose distributions FID and its kin compare.

By source: ``builtin:pca``, principal components of the reference pictures' thumbnails, small enough
for any machine; a folder with the Inception that published FIDs use, ``INCEPTION_FILE``; or a
transformers image model (CLIP, DINOv2) by folder or hub id. A figure holds for its extractor alone.

Legend: N pictures, D features.
"""

import hashlib
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor

from pixart_models.config import ModelInputError
from pixart_models.revision import model_revision
from pixart_models.text import (
    ModelNotFound,
    ModelSpec,
    explain_failure,
    find_model,
    require_all_weights,
)

PCA = "builtin:pca"
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
SPEC = ModelSpec("feature extractor", "AutoModel", others=("*.json",))
CLIP = ModelSpec("CLIP model", "CLIPModel", mark=("model_type", "clip"), others=("*.json", "*.txt"))
_INCEPTION_SHA256 = "6726825d"  # how the official file's begins, as its name says
_SIDE = 24  # pixels of a thumbnail
_WIDTH = 64  # features of the builtin extractor

Pictures = Sequence[NDArray[np.uint8]]
"""RGB pictures (H, W, 3)."""


class Extractor(Protocol):
    """Turns pictures into features."""

    def extract(self, pictures: Pictures) -> NDArray[np.float32]:
        """(N, D), one row a picture."""
        ...


class PcaExtractor:
    """Thumbnails on their principal components, in units of the components' mean deviation."""

    def __init__(self, mean: NDArray[np.float32], axes: NDArray[np.float32]) -> None:
        self.mean, self.axes = mean, axes  # (d,), (d, D)

    @classmethod
    def fit(cls, pictures: Pictures) -> "PcaExtractor":
        """Raises ModelInputError for pictures that are all alike."""
        rows = _thumbnails(pictures).astype(np.float64)  # (N, d)
        mean = rows.mean(axis=0)
        variances, axes = np.linalg.eigh(np.cov(rows, rowvar=False))
        largest = np.argsort(-variances)[: min(_WIDTH, len(rows) - 1)]
        deviation = float(np.sqrt(variances[largest].clip(0).mean()))
        if not deviation > 1e-4:
            raise ModelInputError(
                f"{PCA}: the {len(rows)} reference pictures are all alike; give others"
            )
        chosen = axes[:, largest]
        signs = np.sign(chosen[np.abs(chosen).argmax(axis=0), range(chosen.shape[1])])
        scaled: NDArray[np.float32] = (chosen * signs / deviation).astype(np.float32)
        return cls(mean.astype(np.float32), scaled)

    def dump(self) -> bytes:
        """As a safetensors file."""
        # Written as it lies in memory, whatever its order: rows first.
        return save({"mean": self.mean, "axes": np.ascontiguousarray(self.axes)})

    @classmethod
    def load(cls, path: Path) -> "PcaExtractor":
        """Raises ModelNotFound."""
        try:
            found = load_file(path)
            return cls(found["mean"], found["axes"])
        except (OSError, SafetensorError, KeyError) as error:
            why = f"{path} is damaged ({error}); delete it and evaluate again"
            raise ModelNotFound(SPEC.kind, PCA, why) from error

    def extract(self, pictures: Pictures) -> NDArray[np.float32]:
        found = (_thumbnails(pictures) - self.mean) @ self.axes
        return found.astype(np.float32)


def _thumbnails(pictures: Pictures) -> NDArray[np.float32]:
    """(N, d) in 0-1; Pillow's bicubic filter widens when it shrinks."""
    small = [
        np.asarray(Image.fromarray(p).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
        for p in pictures
    ]
    return np.stack(small).reshape(len(small), -1).astype(np.float32) / np.float32(255)


class ImageModel:
    """A transformers image model: its projected features (CLIP), pooled ones, or first token."""

    def __init__(self, source: str, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        folder = find_model(SPEC, source).folder
        with explain_failure(SPEC, source):
            self._processor: Any = AutoImageProcessor.from_pretrained(folder)
        self._model = _load(SPEC, AutoModel, source, device)

    @torch.inference_mode()
    def extract(self, pictures: Pictures) -> NDArray[np.float32]:
        shown = self._processor(images=_as_images(pictures), return_tensors="pt")
        pixels = shown["pixel_values"].to(self._model.device)
        if hasattr(self._model, "get_image_features"):
            return _to_numpy(_pooled(self._model.get_image_features(pixel_values=pixels)))
        return _to_numpy(_pooled(self._model(pixel_values=pixels)))


class ClipScorer:
    """How well pictures fit their texts: 100 times the cosine of CLIP's embeddings.

    As torchmetrics' ``clip_score`` of each pair, before it is cut at 0; a long text is cut to what
    the model reads.
    """

    def __init__(self, source: str, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        folder = find_model(CLIP, source).folder
        with explain_failure(CLIP, source):
            self._processor: Any = AutoImageProcessor.from_pretrained(folder)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model = _load(CLIP, CLIPModel, source, device)

    @torch.inference_mode()
    def score(self, pictures: Pictures, texts: Sequence[str]) -> list[float]:
        model = self._model
        shown = self._processor(images=_as_images(pictures), return_tensors="pt").to(model.device)
        said = self._tokenizer(
            list(texts), padding=True, truncation=True, return_tensors="pt",
            max_length=model.config.text_config.max_position_embeddings,
        ).to(model.device)  # fmt: skip
        seen = _pooled(model.get_image_features(pixel_values=shown["pixel_values"]))
        told = _pooled(model.get_text_features(said["input_ids"], said["attention_mask"]))
        found: list[float] = (100 * torch.cosine_similarity(seen, told).double()).tolist()
        return found


class Inception:
    """The network of published FIDs, with torch-fidelity's TensorFlow-like resizing to 299 pixels.

    Its file is a pickle: read as tensors alone, and only if its digest is the official one's.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        source = str(path.parent)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            why = f"{error}; pip install 'pixart-ray[inception]'"
            raise ModelNotFound(SPEC.kind, source, why) from error
        data = path.read_bytes()
        if not hashlib.sha256(data).hexdigest().startswith(_INCEPTION_SHA256):
            why = f"{path.name} is not the official file: its SHA-256 is another; fetch it again"
            raise ModelNotFound(SPEC.kind, source, why)
        try:
            tensors = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise ModelNotFound(SPEC.kind, source, f"{path.name}: {error}") from error
        with explain_failure(SPEC, source):
            # torch-fidelity unpickles whatever it is given, so it gets tensors written here.
            torch.save(tensors, clean := io.BytesIO())
            clean.seek(0)
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], clean)
        self._network, self._device = network.to(device).eval(), device

    @torch.inference_mode()
    def extract(self, pictures: Pictures) -> NDArray[np.float32]:
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(self._device)
        return _to_numpy(self._network(pixels)[0])


def load_extractor(source: str, device: str = "cpu", fitted: Path | None = None) -> Extractor:
    """The extractor of a source; ``fitted`` is where a builtin one was kept. ModelNotFound."""
    if source == PCA:
        assert fitted is not None, "the builtin extractor is fitted first"
        return PcaExtractor.load(fitted)
    inception = Path(source).expanduser() / INCEPTION_FILE
    return Inception(inception, device) if inception.is_file() else ImageModel(source, device)


def extractor_revision(source: str, spec: ModelSpec = SPEC) -> str:
    """What tells it (or of ``spec`` CLIP) from another of the same name. Raises ModelNotFound."""
    if source.startswith("builtin:") and source != PCA:
        raise ModelNotFound(
            SPEC.kind, source, f"of those built in there is {PCA}; or give a folder"
        )
    inception = Path(source).expanduser() / INCEPTION_FILE
    if inception.is_file():
        return hashlib.sha256(inception.read_bytes()).hexdigest()[:16]
    return model_revision(spec, source)


def _load(spec: ModelSpec, kind: Any, source: str, device: str) -> Any:
    """The weights of ``source``, all of them, in fp32."""
    with explain_failure(spec, source):
        model, report = kind.from_pretrained(
            find_model(spec, source).folder, dtype=torch.float32, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    require_all_weights(spec, source, report)
    return model.to(device).eval().requires_grad_(False)


def _as_images(pictures: Pictures) -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in pictures]


def _pooled(output: Any) -> Tensor:
    """(N, D) of a model's output, whatever it calls it."""
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    found: Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled
    return found.flatten(1)


def _to_numpy(features: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = features.float().cpu().numpy()
    return found
