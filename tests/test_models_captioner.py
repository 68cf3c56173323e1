"""Captioners: the digit reader, the raw caption, and real (tiny, random) models from folders: a
LLaVA, whose pictures all become one size, and a Qwen2.5-VL, where each picture has its own."""

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pixart_jobs.scenes import compose_scene
from pixart_models.captioner import (
    Caption,
    RawCaptioner,
    SampleCaptioner,
    VisionLanguageCaptioner,
    captioner_revision,
    compose_request,
    load_captioner,
    make_caption,
)
from pixart_models.config import ModelInputError
from pixart_models.digits import describe
from pixart_models.text import ModelNotFound

PROMPT = "Describe this image and its style in a very detailed manner"
RAW_CAPTIONS = ["scan three", "", "a much longer raw caption about digits in the dark"]
BLANK = np.zeros((48, 48, 3), np.uint8)
CHAT_TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %} {{ c.text }}{% endif %}"
    "{% endfor %}{% endfor %} answer"
)


QWEN_MARKS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
Images = list[NDArray[np.uint8]]


def learn_tokenizer(marks: list[str], end: str, start: str = "") -> Any:
    """Byte-level BPE whose first tokens are ``marks``, the first of them padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=marks, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator([PROMPT, *RAW_CAPTIONS], trainer)
    names = {"bos_token": start} if start else {}
    if start:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, marks.index(start))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=marks[0], eos_token=end, padding_side="right",
        additional_special_tokens=marks, **names,
    )  # fmt: skip


def write_llava(folder: Path, chat_template: str | None = None) -> Path:
    """Every part as in LLaVA 1.5 (CLIP's ViT, projector, LLaMA, processor), a few units wide."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = learn_tokenizer(["<pad>", "<s>", "</s>", "<image>"], end="</s>", start="<s>")
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14, projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.6,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=2.0)
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=chat_template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_qwen(folder: Path) -> Path:
    """As published, but for a processor that reads no videos: that half needs torchvision."""
    from transformers import (
        AutoProcessor,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.processing_utils import ProcessorMixin

    class PictureQwenProcessor(Qwen2_5_VLProcessor):  # type: ignore[misc]  # untyped
        def __init__(
            self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
        ) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = 5, 6
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    text = {
        "vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 2,
        "pad_token_id": 0, "initializer_range": 0.6, "rope_parameters": {
            "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6,
        },
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2,
        "out_hidden_size": 16, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1],
        "initializer_range": 0.6,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=5, video_token_id=6,
        vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    AutoProcessor.register(Qwen2_5_VLConfig, PictureQwenProcessor, exist_ok=True)
    PictureQwenProcessor(
        image_processor=Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16),
        tokenizer=learn_tokenizer(QWEN_MARKS, end="<|im_end|>"), chat_template=QWEN_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


WRITERS = {"llava": write_llava, "qwen": write_qwen}


def open_captioner(folder: Path, **options: Any) -> VisionLanguageCaptioner:
    settings: dict[str, Any] = {"prompts": [PROMPT], "max_new_tokens": 6} | options
    captioner = load_captioner(str(folder), **settings)
    assert isinstance(captioner, VisionLanguageCaptioner)
    return captioner


def texts(captions: Sequence[Sequence[Caption]]) -> list[list[str]]:
    return [[caption.text for caption in row] for row in captions]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


@pytest.fixture(scope="module", params=WRITERS)
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> VisionLanguageCaptioner:
    return open_captioner(folders[request.param])


@pytest.fixture(scope="module")
def llava(folders: dict[str, Path]) -> VisionLanguageCaptioner:
    return open_captioner(folders["llava"])


@pytest.fixture(scope="module")
def images() -> Images:
    """Three different pictures of different sizes."""
    scenes = [compose_scene(i, seed=1).image for i in range(3)]
    return [scenes[0], scenes[1][:40], scenes[2][:, :36]]


def test_a_model_writes_one_caption_a_picture_and_the_same_alone(
    model: VisionLanguageCaptioner, images: Images
) -> None:
    """Prompts of different lengths are padded on the left: on the right they would change."""
    together = model.caption(images, RAW_CAPTIONS)
    assert all(len(row) == 1 and row[0].text and not row[0].problem for row in together)
    alone = [model.caption([i], [raw])[0] for i, raw in zip(images, RAW_CAPTIONS, strict=True)]
    assert together == alone
    assert model.caption([], []) == []


def test_a_model_sees_the_picture_and_the_raw_caption(
    model: VisionLanguageCaptioner, images: Images
) -> None:
    assert model.caption(images[:1], [""]) != model.caption(images[1:2], [""])
    assert model.caption(images[:1], ["scan three"]) != model.caption(images[:1], [""])


@pytest.mark.parametrize("name", WRITERS)
def test_each_prompt_makes_a_caption_in_its_place(
    name: str, folders: dict[str, Path], images: Images
) -> None:
    prompts = [PROMPT, "Name the digits"]
    both = open_captioner(folders[name], prompts=prompts).caption(images, RAW_CAPTIONS)
    each = [
        open_captioner(folders[name], prompts=[prompt]).caption(images, RAW_CAPTIONS)
        for prompt in prompts
    ]
    assert both == [[first[0], second[0]] for first, second in zip(*each, strict=True)]
    assert each[0] != each[1]


def test_the_raw_caption_is_shown_only_where_the_recipe_says_so(
    folders: dict[str, Path], images: Images
) -> None:
    blind = open_captioner(folders["llava"], show_raw=False)
    assert blind.caption(images[:1], ["scan three"]) == blind.caption(images[:1], [""])
    assert blind._ask(PROMPT, "scan three") == f"USER: <image>\n{PROMPT} ASSISTANT:"


def test_a_request_holds_the_raw_caption_only_when_there_is_one() -> None:
    assert compose_request(PROMPT, " \n") == PROMPT
    assert compose_request(PROMPT, 'a "red" {3}') == (
        'Given the caption of this image "a "red" {3}", describe this image and its '
        "style in a very detailed manner"
    )


@pytest.mark.parametrize("mark", ["<image>", "<|image_pad|>", "</s>", "[/INST]", "<b>"])
def test_a_raw_caption_that_spells_a_control_token_is_only_text(mark: str) -> None:
    shown = f'"red < blue {mark[1:-1]} [Ink] > 3"'
    assert shown in compose_request(PROMPT, f"red < {mark}blue {mark[1:-1]} [Ink]  > 3 {mark}")


def test_an_image_mark_in_a_raw_caption_asks_for_no_second_picture(
    model: VisionLanguageCaptioner, images: Images
) -> None:
    captions = model.caption(images[:2], ["an <image> of <|image_pad|>", "scan three"])
    assert all(row[0].text for row in captions)


def test_of_a_ten_thousand_word_raw_caption_the_beginning_is_shown() -> None:
    request = compose_request(PROMPT, "word " * 10_000)
    assert 2000 < len(request) < 2200


def test_a_models_own_chat_template_is_used(tmp_path: Path, images: Images) -> None:
    captioner = open_captioner(write_llava(tmp_path, CHAT_TEMPLATE))
    assert captioner._ask(PROMPT, "") == f"<image> {PROMPT} answer"
    assert len(captioner.caption(images, RAW_CAPTIONS)) == 3


def test_a_template_that_writes_the_start_token_gets_no_second_one(
    tmp_path: Path, llava: VisionLanguageCaptioner, images: Images
) -> None:
    template = "<s>USER: <image>\n{{ messages[0].content[1].text }} ASSISTANT:"
    captioner = open_captioner(write_llava(tmp_path, template))
    assert captioner.caption(images, RAW_CAPTIONS) == llava.caption(images, RAW_CAPTIONS)


def test_a_picture_that_a_model_refuses_gives_its_reason_and_the_others_their_captions(
    folders: dict[str, Path], images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    """Qwen-VL refuses pictures 200 times as long as high."""
    qwen = open_captioner(folders["qwen"])
    ribbon = np.zeros((1, 300, 3), np.uint8)
    found = qwen.caption([*images, ribbon, images[0]], [*RAW_CAPTIONS, "", RAW_CAPTIONS[0]])
    assert found[3][0].text == ""
    assert "aspect ratio must be smaller than 200" in found[3][0].problem
    assert "5 pictures" in caplog.text
    expected = qwen.caption(images, RAW_CAPTIONS)
    assert [*found[:3], found[4]] == [*expected, expected[0]]


class SmallMemory:
    """A model on a device that holds a batch of two, or of ``fits``."""

    def __init__(self, generate: Any, error: type[Exception], fits: int = 2) -> None:
        self._generate, self._error, self._fits = generate, error, fits
        self.sizes: list[int] = []

    def __call__(self, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        self.sizes.append(len(input_ids))
        if len(input_ids) > self._fits:
            raise self._error("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines.")
        written: torch.Tensor = self._generate(input_ids=input_ids, **inputs)
        return written


def test_a_batch_that_does_not_fit_is_halved(
    llava: VisionLanguageCaptioner, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llava.caption(images * 2, RAW_CAPTIONS * 2)
    small = SmallMemory(llava._model.generate, torch.OutOfMemoryError)
    monkeypatch.setattr(llava._model, "generate", small)
    assert llava.caption(images * 2, RAW_CAPTIONS * 2) == expected
    assert small.sizes == [6, 3, 1, 2, 3, 1, 2]
    nothing = SmallMemory(llava._model.generate, torch.OutOfMemoryError, fits=0)
    monkeypatch.setattr(llava._model, "generate", nothing)
    with pytest.raises(ModelInputError, match=r"out of GPU memory with a single picture .*lower"):
        llava.caption(images[:2], ["", ""])


def test_a_lost_device_is_no_pictures_fault(
    llava: VisionLanguageCaptioner, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor must die and its partition be done again; otherwise all rows would be rejected."""
    lost = SmallMemory(llava._model.generate, torch.AcceleratorError)
    monkeypatch.setattr(llava._model, "generate", lost)
    with pytest.raises(torch.AcceleratorError):
        llava.caption(images, RAW_CAPTIONS)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A cat. It sits on a", "A cat."),
        ('He says "go!" and (then) stops.) Then', 'He says "go!" and (then) stops.)'),
        ("It costs 3.50 and is", "It costs 3.50 and is"),
        ("One. Two.", "One. Two."),
        ("no sentence at all", "no sentence at all"),
        ("First.\n\nSecond? Thi", "First.\n\nSecond?"),
    ],
)
def test_what_is_cut_off_ends_at_its_last_full_sentence(text: str, kept: str) -> None:
    assert make_caption(f" {text} ", finished=False) == Caption(kept)
    assert make_caption(text, finished=True) == Caption(text)


def test_who_writes_nothing_has_a_problem() -> None:
    assert make_caption(" \n", finished=True) == Caption(problem="the model wrote nothing")


def test_a_model_that_stops_by_itself_is_not_cut(
    folders: dict[str, Path], images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at the last full stop only where no end token was written."""
    captioner = open_captioner(folders["llava"])
    tokenizer = captioner._processor.tokenizer
    said = tokenizer("Red. Blue", add_special_tokens=False)["input_ids"]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = torch.tensor([[*said, end, pad], [*said, *said[:2]]])
        return torch.cat([input_ids, rows], dim=1)

    monkeypatch.setattr(captioner._model, "generate", generate)
    assert texts(captioner.caption(images[:2], ["", ""])) == [["Red. Blue"], ["Red."]]


def test_an_unknown_model_says_how_to_get_it(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    with pytest.raises(ModelNotFound, match=rf"captioner '{missing}': .* a local folder or ORG/NA"):
        load_captioner(missing, prompts=[PROMPT])
    with pytest.raises(ModelNotFound, match="'hf download someone/a-vlm' fetches it"):
        load_captioner("someone/a-vlm", prompts=[PROMPT])
    with pytest.raises(ModelNotFound, match="'hf download someone/a-vlm' fetches it"):
        captioner_revision("vllm:someone/a-vlm")


def test_a_captioner_without_safetensors_says_what_is_there(tmp_path: Path) -> None:
    folder = write_llava(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match=r"only pytorch_model.bin, no model.safetensors"):
        load_captioner(str(folder), prompts=[PROMPT])


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="nothing is missing")
def test_a_processor_that_reads_videos_too_names_the_package_it_needs(tmp_path: Path) -> None:
    folder = write_qwen(tmp_path)
    parts = json.loads((folder / "processor_config.json").read_text())
    images = parts.pop("image_processor") | {"image_processor_type": "Qwen2VLImageProcessor"}
    images["processor_class"] = parts["processor_class"] = "Qwen2_5_VLProcessor"
    (folder / "processor_config.json").write_text(json.dumps(parts))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    with pytest.raises(ModelNotFound, match="requires the Torchvision library"):
        load_captioner(str(folder), prompts=[PROMPT])


def test_a_captioner_knows_the_commit_it_came_from(tmp_path: Path) -> None:
    """As the hub's cache keeps it."""
    commit = "0123456789" * 4
    folder = write_llava(tmp_path / "snapshots" / commit)
    assert open_captioner(folder).revision == captioner_revision(str(folder)) == commit


def test_a_folders_revision_changes_with_its_texts_and_its_weights_and_nothing_else(
    tmp_path: Path,
) -> None:
    folder = write_llava(tmp_path)
    first = captioner_revision(str(folder))
    assert len(first) == 16
    assert first == captioner_revision(f"vllm:{folder}") == open_captioner(folder).revision
    (folder / "README.md").write_text("read me")
    os.utime(folder / "config.json", (0, 0))
    assert captioner_revision(str(folder)) == first

    weights = folder / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    second = captioner_revision(str(folder))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert len({first, second, captioner_revision(str(folder))}) == 3


def test_the_digit_captioner_reads_pixels_and_reports_what_it_cannot_read() -> None:
    captioner = load_captioner("builtin:digits", prompts=[PROMPT])
    assert isinstance(captioner, SampleCaptioner)
    scenes = [compose_scene(i, seed=3) for i in range(4)]
    pictures = [scenes[0].image, BLANK, *(scene.image for scene in scenes[1:])]
    captions = captioner.caption(pictures, ["a lie"] * 5)
    assert captions.pop(1) == [Caption(problem="no digit found: the picture has no bright strokes")]
    assert captions == [[Caption(describe(scene.reading))] for scene in scenes]


def test_the_raw_captioner_keeps_what_there_is() -> None:
    captioner = load_captioner("builtin:raw", prompts=[PROMPT])
    assert isinstance(captioner, RawCaptioner)
    captions = captioner.caption([BLANK, BLANK], ["a cat", ""])
    assert captions == [[Caption("a cat")], [Caption(problem="no raw caption")]]
    assert captioner.revision == captioner_revision("builtin:raw")
