"""Captioners: who looks at a picture and writes what a text-to-image model should learn from.

One interface, two implementations: the demo's reader of digit scenes, and any transformers
image-text model (LLaVA class) asked with the paper's prompt. A picture that cannot be captioned
gives its reason instead of a caption; the batch goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pixart_models.digits import DigitReader, UnreadableImage, describe
from pixart_models.text import ModelSpec, explain_failure, find_model, require_all_weights

BUILTIN = "builtin:digits"
RAW = "builtin:raw"
SPEC = ModelSpec(
    "captioner", "AutoModelForImageTextToText", others=("*.json", "*.jinja", "*.model", "*.txt")
)
PROMPT_WITH_CAPTION = 'Given the caption of this image "{caption}", {request}'


@dataclass(frozen=True)
class Caption:
    """A dense caption, or the reason there is none."""

    text: str = ""
    problem: str = ""


class Captioner(Protocol):
    """Writes a caption for each picture (H, W, 3) uint8, given the raw captions it came with."""

    name: str
    revision: str

    def caption(
        self, images: Sequence[NDArray[np.uint8]], raw_captions: Sequence[str]
    ) -> list[Caption]: ...


class DigitCaptioner:
    """Reads digit scenes from pixels; the raw caption is ignored."""

    name = BUILTIN
    revision = "1"

    def __init__(self) -> None:
        self._reader = DigitReader("train")

    def caption(
        self, images: Sequence[NDArray[np.uint8]], raw_captions: Sequence[str]
    ) -> list[Caption]:
        captions = []
        for image in images:
            try:
                captions.append(Caption(describe(self._reader.read(image))))
            except UnreadableImage as error:
                captions.append(Caption(problem=str(error)))
        return captions


class RawCaptioner:
    """Keeps the raw caption; for images that came with good ones, and as a baseline."""

    name = RAW
    revision = "1"

    def caption(
        self, images: Sequence[NDArray[np.uint8]], raw_captions: Sequence[str]
    ) -> list[Caption]:
        return [Caption(raw) if raw else Caption(problem="no raw caption") for raw in raw_captions]


class VisionLanguageCaptioner:
    """A transformers image-text-to-text model, asked ``prompt`` about each picture.

    Where a raw caption exists it is offered as context, as the paper does. Decoding is greedy, so
    a table can be made again; bf16 on an accelerator, fp32 on CPU.
    """

    def __init__(
        self, source: str, prompt: str, max_new_tokens: int = 256, device: str = "cpu"
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        folder = find_model(SPEC, source).folder
        with explain_failure(SPEC, source):
            self._processor: Any = AutoProcessor.from_pretrained(folder)
            self._model, report = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
        require_all_weights(SPEC, source, report)
        self._model = self._model.to(device).eval()
        self._processor.tokenizer.padding_side = "left"  # generation continues from the right end
        self.name = source
        self.revision = folder.name if folder.parent.name == "snapshots" else "local"
        self._prompt, self._max_new_tokens = prompt, max_new_tokens

    def _ask(self, raw_caption: str) -> str:
        request = self._prompt
        if mark := getattr(self._processor, "image_token", ""):
            raw_caption = raw_caption.replace(mark, " ").strip()  # it would ask for a second image
        if raw_caption:
            request = PROMPT_WITH_CAPTION.format(
                caption=raw_caption, request=request[:1].lower() + request[1:]
            )
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": request}]
            chat = [{"role": "user", "content": content}]
            return str(self._processor.apply_chat_template(chat, add_generation_prompt=True))
        return f"USER: {self._processor.image_token}\n{request} ASSISTANT:"  # LLaVA 1.5's format

    @torch.inference_mode()
    def caption(
        self, images: Sequence[NDArray[np.uint8]], raw_captions: Sequence[str]
    ) -> list[Caption]:
        inputs = self._processor(
            images=[Image.fromarray(image) for image in images],
            text=[self._ask(raw) for raw in raw_captions],
            padding=True,
            return_tensors="pt",
        ).to(self._model.device, self._model.dtype)
        written = self._model.generate(
            **inputs, max_new_tokens=self._max_new_tokens, do_sample=False
        )
        new_tokens = written[:, inputs["input_ids"].shape[1] :]
        texts = self._processor.batch_decode(new_tokens, skip_special_tokens=True)
        return [
            Caption(text.strip()) if text.strip() else Caption(problem="the model wrote nothing")
            for text in texts
        ]


def load_captioner(
    source: str, *, prompt: str, max_new_tokens: int, device: str = "cpu"
) -> Captioner:
    """``builtin:digits``, ``builtin:raw``, or a vision-language model by local folder or hub id.

    Raises ModelNotFound.
    """
    if source == BUILTIN:
        return DigitCaptioner()
    if source == RAW:
        return RawCaptioner()
    return VisionLanguageCaptioner(source, prompt, max_new_tokens, device)
