"""Captioners: the digit reader, the raw caption, and a real (tiny, random) LLaVA from a folder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pixart_jobs.scenes import compose_scene
from pixart_models.captioner import (
    Caption,
    DigitCaptioner,
    RawCaptioner,
    VisionLanguageCaptioner,
    load_captioner,
)
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


def write_llava(folder: Path, chat_template: str | None = None) -> Path:
    """Every part as in LLaVA 1.5 (CLIP's ViT, projector, LLaMA, processor), a few units wide."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<s>", "</s>", "<image>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator([PROMPT, *RAW_CAPTIONS], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
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


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageCaptioner:
    folder = write_llava(tmp_path_factory.mktemp("llava"))
    captioner = load_captioner(str(folder), prompt=PROMPT, max_new_tokens=6)
    assert isinstance(captioner, VisionLanguageCaptioner)
    return captioner


@pytest.fixture(scope="module")
def images() -> list[NDArray[np.uint8]]:
    """Three different pictures of different sizes."""
    scenes = [compose_scene(i, seed=1).image for i in range(3)]
    return [scenes[0], scenes[1][:40], scenes[2][:, :36]]


def test_llava_writes_one_caption_a_picture_and_the_same_alone(
    llava: VisionLanguageCaptioner, images: list[NDArray[np.uint8]]
) -> None:
    """Prompts of different lengths are padded on the left: on the right they would change."""
    together = llava.caption(images, RAW_CAPTIONS)
    assert len(together) == 3
    assert all(caption.text and not caption.problem for caption in together)
    alone = [llava.caption([i], [raw])[0] for i, raw in zip(images, RAW_CAPTIONS, strict=True)]
    assert together == alone


def test_llava_sees_the_picture_and_the_raw_caption(
    llava: VisionLanguageCaptioner, images: list[NDArray[np.uint8]]
) -> None:
    assert llava.caption(images[:1], [""]) != llava.caption(images[1:2], [""])
    assert llava.caption(images[:1], ["scan three"]) != llava.caption(images[:1], [""])


def test_the_prompt_holds_the_raw_caption_only_when_there_is_one(
    llava: VisionLanguageCaptioner,
) -> None:
    assert llava._ask("") == f"USER: <image>\n{PROMPT} ASSISTANT:"
    assert llava._ask('a "red" {3}') == (
        'USER: <image>\nGiven the caption of this image "a "red" {3}", describe this image and its '
        "style in a very detailed manner ASSISTANT:"
    )


def test_a_raw_caption_that_spells_the_image_mark_is_only_text(
    llava: VisionLanguageCaptioner, images: list[NDArray[np.uint8]]
) -> None:
    captions = llava.caption(images[:2], ["an <image> of <image>", "scan three"])
    assert all(caption.text for caption in captions)


def test_a_models_own_chat_template_is_used(
    tmp_path: Path, images: list[NDArray[np.uint8]]
) -> None:
    captioner = VisionLanguageCaptioner(
        str(write_llava(tmp_path, CHAT_TEMPLATE)), PROMPT, max_new_tokens=2
    )
    assert captioner._ask("") == f"<image> {PROMPT} answer"
    assert len(captioner.caption(images, RAW_CAPTIONS)) == 3


def test_an_unknown_model_says_how_to_get_it(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    with pytest.raises(ModelNotFound, match=rf"captioner '{missing}': .* a local folder or ORG/NA"):
        load_captioner(missing, prompt=PROMPT, max_new_tokens=1)
    with pytest.raises(ModelNotFound, match="'hf download someone/a-vlm' fetches it"):
        load_captioner("someone/a-vlm", prompt=PROMPT, max_new_tokens=1)


def test_a_captioner_without_safetensors_says_what_is_there(tmp_path: Path) -> None:
    folder = write_llava(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match=r"only pytorch_model.bin, no model.safetensors"):
        load_captioner(str(folder), prompt=PROMPT, max_new_tokens=1)


def test_a_captioner_knows_the_commit_it_came_from(
    llava: VisionLanguageCaptioner, tmp_path: Path
) -> None:
    """As the hub's cache keeps it; a folder of one's own has none."""
    assert llava.revision == "local"
    folder = write_llava(tmp_path / "snapshots" / "0123abc")
    captioner = load_captioner(str(folder), prompt=PROMPT, max_new_tokens=1)
    assert isinstance(captioner, VisionLanguageCaptioner)
    assert captioner.revision == "0123abc"


def test_the_digit_captioner_reads_pixels_and_reports_what_it_cannot_read() -> None:
    captioner = load_captioner("builtin:digits", prompt=PROMPT, max_new_tokens=1)
    assert isinstance(captioner, DigitCaptioner)
    scenes = [compose_scene(i, seed=3) for i in range(4)]
    pictures = [scenes[0].image, BLANK, *(scene.image for scene in scenes[1:])]
    captions = captioner.caption(pictures, ["a lie"] * 5)
    assert captions[1] == Caption(problem="no digit found: the picture has no bright strokes")
    assert [c.text for c in captions if c.text] == [describe(scene.reading) for scene in scenes]


def test_the_raw_captioner_keeps_what_there_is() -> None:
    captioner = load_captioner("builtin:raw", prompt=PROMPT, max_new_tokens=1)
    assert isinstance(captioner, RawCaptioner)
    captions = captioner.caption([BLANK, BLANK], ["a cat", ""])
    assert captions == [Caption("a cat"), Caption(problem="no raw caption")]
