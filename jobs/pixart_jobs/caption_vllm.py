"""Captioning with vLLM through ray.data.llm, for GPU clusters: continuous batching in the engine.

Takes and gives the rows of ``caption``, in their order: id, status, raw caption and decoded picture
in, id, status and captions out. A request is a row and a prompt. Rows that are rejected already go
past the engine the way ray.data.llm lets failed ones pass: with ``__inference_error__`` set.
Pictures travel to the engine as pixels, nothing is encoded again, and they do not travel back.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from ray.data import Dataset
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from pixart_jobs.caption import settle
from pixart_jobs.recipe import CaptionSettings
from pixart_models.captioner import VLLM, Caption, compose_request, make_caption
from pixart_models.text import ModelNotFound
from pixart_platform.tables import OK

_ERROR = "__inference_error__"  # ray.data.llm's column
_ANSWER = ("kept", "generated_text", "num_generated_tokens")
Row = dict[str, Any]


def build(source: str, settings: CaptionSettings, revision: str) -> Callable[[Dataset], Dataset]:
    """What captions a dataset of partitions, on ``num_workers`` engines of ``num_gpus`` GPUs each.

    ``source`` is ``vllm:ID`` (hub id or local folder), ``revision`` its ``captioner_revision``.
    Further columns, as a partition's number, come back. No block is split, but blocks of fewer
    requests than ``batch_images`` may come back joined. Raises ModelNotFound without the extra.
    """
    model = source.removeprefix(VLLM)
    if not find_spec("vllm"):
        why = f"no vLLM here; pip install 'pixart-ray[vllm]', or write {model!r} for transformers"
        raise ModelNotFound("captioner", source, why)
    answer = build_processor(
        configure(model, settings, revision),
        preprocess=lambda row: request(row, settings),
        postprocess=lambda row: {name: row[name] for name in _ANSWER},
    )
    return lambda rows: answer(rows.flat_map(lambda row: spread(row, settings))).map_batches(
        lambda answers: gather(answers, settings), batch_format="pyarrow", batch_size=None
    )


def configure(model: str, settings: CaptionSettings, revision: str) -> vLLMEngineProcessorConfig:
    """The engine, which prepares tokens and pictures itself; failing requests do not stop it."""
    local = Path(model).expanduser()
    engine = {
        "limit_mm_per_prompt": {"image": 1},
        "tensor_parallel_size": max(1, int(settings.num_gpus)),
    }
    return vLLMEngineProcessorConfig(
        model_source=str(local) if local.is_dir() else model,
        engine_kwargs=engine if local.is_dir() else engine | {"revision": revision},
        concurrency=settings.num_workers,
        batch_size=settings.batch_images,
        should_continue_on_error=True,
        tokenize_stage=False,
        detokenize_stage=False,
    )


def spread(row: Row, settings: CaptionSettings) -> list[Row]:
    """The row once for each prompt; ``kept`` is what comes back of it."""
    kept = {name: row[name] for name in row if name not in ("pixels", "width", "height")}
    return [row | {"kept": kept, "question": prompt} for prompt in settings.prompts]


def request(row: Row, settings: CaptionSettings) -> Row:
    """What the engine needs; these columns join the row's, and ``pixels`` becomes empty."""
    if row["status"] != OK:
        return {"pixels": b"", _ERROR: row["status"]}
    question = compose_request(row["question"], row["raw_caption"] if settings.show_raw else "")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    picture = Image.frombytes("RGB", (row["width"], row["height"]), row["pixels"])
    return {
        "pixels": b"",
        "messages": [{"role": "user", "content": content}],
        "multimodal_data": {"image": picture},
        "sampling_params": {"max_tokens": settings.max_new_tokens, "temperature": 0.0},
    }


def gather(answers: pa.Table, settings: CaptionSettings) -> pa.Table:
    """The rows again, from their requests: one a prompt, one after another."""
    names = [name for name in (*_ANSWER, _ERROR) if name in answers.column_names]
    items = answers.select(names).to_pylist()
    rows = []
    for start in range(0, len(items), len(settings.prompts)):
        row = items[start]["kept"] | {"captions": []}
        raw = row.pop("raw_caption") or ""
        if row["status"] == OK:
            group = items[start : start + len(settings.prompts)]
            captions = [_read_answer(item, settings.max_new_tokens) for item in group]
            row["status"], row["captions"] = settle(captions, raw if settings.keep_raw else None)
        rows.append(row)
    return pa.Table.from_pylist(rows)


def _read_answer(item: Row, max_new_tokens: int) -> Caption:
    if problem := item.get(_ERROR):
        return Caption(problem=problem.splitlines()[0][:200])
    return make_caption(item["generated_text"], item["num_generated_tokens"] < max_new_tokens)
