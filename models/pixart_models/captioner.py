"""Captioners: who looks at a picture and writes what a text-to-image model should learn from.

One interface, three implementations: the demo's reader of digit scenes, the raw caption, and any
transformers image-text model (LLaVA, Qwen-VL) asked with the recipe's prompts, by default the
paper's. A picture that cannot be captioned gives its reason instead of a caption; the batch goes
on.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pixart_models.config import ModelInputError
from pixart_models.crowds import CrowdReader, describe_crowd
from pixart_models.digits import READER, DigitReader, UnreadableImage, describe
from pixart_models.revision import model_revision, revision_of
from pixart_models.text import ModelSpec, explain_failure, find_model, require_all_weights

DIGITS, CROWDS = "builtin:digits", "builtin:crowds"
RAW = "builtin:raw"
VLLM = "vllm:"
SPEC = ModelSpec(
    "captioner", "AutoModelForImageTextToText", others=("*.json", "*.jinja", "*.model", "*.txt"),
    built_in=READER,
)  # fmt: skip
PROMPT_WITH_CAPTION = 'Given the caption of this image "{caption}", {request}'
_MAX_RAW_CHARS = 2000  # of a raw caption shown to a model: a web page would drown the picture
_MARK = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z_]{1,20}\]")  # <image>, <|im_end|>, </s>, [INST]
_SENTENCE = re.compile(r".*[.!?][\"')\]]*(?=\s|$)", re.DOTALL)
_FAULTS = (ValueError, RuntimeError, LookupError, TypeError, ArithmeticError)
logger = logging.getLogger(__name__)


_NO_MEMORY = "out of GPU memory"


@dataclass(frozen=True)
class Caption:
    """A caption, or the reason there is none."""

    text: str = ""
    problem: str = ""


class Captioner(Protocol):
    """Writes captions for pictures (H, W, 3) uint8, given the raw captions they came with."""

    name: str
    revision: str

    def caption(
        self, images: Sequence[NDArray[np.uint8]], raw_captions: Sequence[str]
    ) -> list[list[Caption]]:
        """For each picture its captions: one a prompt, in order; one where nothing is prompted."""
        ...


class SampleCaptioner:
    """Reads sample scenes from pixels; the raw caption is ignored."""

    revision = SPEC.built_in

    def __init__(self, name: str) -> None:
        self.name = name
        reader = DigitReader("train")
        crowds = CrowdReader(reader)
        self._tell: Callable[[Sequence[NDArray[np.uint8]]], list[str]] = (
            (lambda images: [describe_crowd(crowds.read(image)) for image in images])
            if name == CROWDS
            else (lambda images: [describe(seen) for seen in reader.read_many(images)])
        )

    def caption(
        self, images: Sequence[NDArray[np.uint8]], raw_captions: Sequence[str]
    ) -> list[list[Caption]]:
        try:
            return [[Caption(text)] for text in self._tell(images)] if images else []
        except UnreadableImage as error:
            if len(images) == 1:
                return [[Caption(problem=str(error))]]
            return [self.caption([image], raw_captions)[0] for image in images]


class RawCaptioner:
    """Keeps the raw caption and needs no images; where those are good, and as a baseline."""

    name = RAW
    revision = SPEC.built_in

    def caption(
        self, images: Sequence[NDArray[np.uint8]], raw_captions: Sequence[str]
    ) -> list[list[Caption]]:
        return [[Caption(raw, "" if raw else "no raw caption")] for raw in raw_captions]


class VisionLanguageCaptioner:
    """A transformers image-text-to-text model, asked each of ``prompts`` about each picture.

    With ``show_raw`` a raw caption is offered as context, as the paper does. Decoding is greedy, so
    a table can be made again; bf16 on an accelerator, fp32 on CPU. What is cut off after
    ``max_new_tokens`` ends at its last full sentence. Raises ModelNotFound.
    """

    def __init__(
        self,
        source: str,
        prompts: Sequence[str],
        *,
        show_raw: bool = True,
        max_new_tokens: int = 256,
        device: str = "cpu",
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        files = find_model(SPEC, source)
        folder = files.folder
        with explain_failure(SPEC, source):
            self._processor: Any = AutoProcessor.from_pretrained(folder)
            self._model, report = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
        require_all_weights(SPEC, source, report)
        self._model = self._model.to(device).eval()
        tokenizer = self._processor.tokenizer
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.name, self.revision = source, revision_of(files)
        self._prompts, self._show_raw = tuple(prompts), show_raw
        self._max_new_tokens = max_new_tokens

    def _ask(self, prompt: str, raw_caption: str) -> str:
        request = compose_request(prompt, raw_caption if self._show_raw else "")
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": request}]
            chat = [{"role": "user", "content": content}]
            return str(self._processor.apply_chat_template(chat, add_generation_prompt=True))
        return f"USER: {self._processor.image_token}\n{request} ASSISTANT:"  # LLaVA 1.5's format

    def caption(
        self, images: Sequence[NDArray[np.uint8]], raw_captions: Sequence[str]
    ) -> list[list[Caption]]:
        pictures = [Image.fromarray(image) for image in images]
        by_prompt = [
            self._answer(pictures, [self._ask(prompt, raw) for raw in raw_captions])
            for prompt in self._prompts
        ]
        return [list(captions) for captions in zip(*by_prompt, strict=True)]

    def _answer(self, pictures: list[Image.Image], texts: list[str]) -> list[Caption]:
        """A batch that fails is halved until the pictures that fail alone, whose problem it is, are
        apart from the others, and until the GPU's memory holds it."""
        try:
            return self._generate(pictures, texts)
        except torch.AcceleratorError:  # the device is lost, which is no picture's fault
            raise
        except torch.OutOfMemoryError:  # its own words tell sizes, which differ between runs
            problem = _NO_MEMORY
        except _FAULTS as error:
            problem = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        half = len(pictures) // 2
        if not half and problem == _NO_MEMORY:  # the machine's fault: no verdict on the picture
            raise ModelInputError(
                f"the captioner is out of GPU memory with a single picture of {pictures[0].size}; "
                f"free the GPU, or lower caption.max_side or max_new_tokens"
            )
        if not half:
            return [Caption(problem=problem)] * len(pictures)
        logger.warning("captioning %d pictures by halves: %s", len(pictures), problem)
        first = self._answer(pictures[:half], texts[:half])
        return first + self._answer(pictures[half:], texts[half:])

    @torch.inference_mode()
    def _generate(self, pictures: list[Image.Image], texts: list[str]) -> list[Caption]:
        tokenizer = self._processor.tokenizer
        has_start = bool(tokenizer.bos_token) and texts[0].startswith(tokenizer.bos_token)
        inputs = self._processor(
            images=[[picture] for picture in pictures], text=texts, return_tensors="pt",
            padding=True, padding_side="left",  # generation continues from the right end
            add_special_tokens=not has_start,
        ).to(self._model.device, self._model.dtype)  # fmt: skip
        written = self._model.generate(
            **inputs, max_new_tokens=self._max_new_tokens, do_sample=False
        )[:, inputs["input_ids"].shape[1] :]
        ends = self._model.generation_config.eos_token_id
        ends = torch.tensor(ends if ends is not None else [], device=written.device)
        finished = torch.isin(written, ends).any(dim=1).tolist()
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        return [make_caption(text, done) for text, done in zip(texts, finished, strict=True)]


def compose_request(prompt: str, raw_caption: str | None) -> str:
    """What is asked about a picture; the raw caption goes before, where there is one.

    Of a raw caption the first 2000 characters, without what reads like a model's control token: an
    ``<image>`` would ask for a second picture.
    """
    shown = " ".join(_MARK.sub(" ", (raw_caption or "")[:_MAX_RAW_CHARS]).split())
    if not shown:
        return prompt
    return PROMPT_WITH_CAPTION.format(caption=shown, request=prompt[:1].lower() + prompt[1:])


def make_caption(text: str, finished: bool) -> Caption:
    """What a model wrote, up to its last full sentence (if it has one) unless it finished."""
    text = text.strip()
    if not finished and (whole := _SENTENCE.match(text)):
        text = whole[0]
    return Caption(text, "" if text else "the model wrote nothing")


def load_captioner(
    source: str,
    *,
    prompts: Sequence[str],
    show_raw: bool = True,
    max_new_tokens: int = 256,
    device: str = "cpu",
) -> Captioner:
    """``builtin:digits``, ``builtin:crowds``, ``builtin:raw``, or a vision-language model.

    That is a local folder or a hub id. Raises ModelNotFound.
    """
    if source in (DIGITS, CROWDS):
        return SampleCaptioner(source)
    if source == RAW:
        return RawCaptioner()
    return VisionLanguageCaptioner(
        source, prompts, show_raw=show_raw, max_new_tokens=max_new_tokens, device=device
    )


def captioner_revision(source: str) -> str:
    """The ``model_revision`` of a captioner, with or without ``vllm:``. Raises ModelNotFound."""
    return model_revision(SPEC, source.removeprefix(VLLM))
