"""Small things to evaluate with: reference tables, prompts files, a CLIP, a recipe."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from builders import make_rows, write_table
from processes import MINI

from pixart_cluster.recipe import FullRecipe, read_recipe
from pixart_jobs.scenes import compose_scene
from pixart_models.digits import describe
from pixart_platform.storage import open_folder
from pixart_platform.tables import Table, TableWriter

REJECTED = "rejected: no caption (none)"


def make_recipe(*overrides: str) -> FullRecipe:
    """The miniature recipe, with two pictures at a time."""
    small = ("evaluate.batch_images=4", "evaluate.num_references=12", "evaluate.prompt_images=2")
    return read_recipe(str(MINI), ["draw.num_steps=2", *small, *overrides])


def write_reference(root: Path, num_rows: int = 20, partition_rows: int = 7) -> dict[str, Table]:
    """An image table of scenes and its caption table, in which each fifth row is rejected."""
    scenes = [compose_scene(i, seed=5) for i in range(num_rows)]
    cuts = range(0, num_rows, partition_rows)
    images: list[dict[str, Any]] = [
        {"id": f"{i:064x}", "source": str(i), "uri": "", "bytes": scene.png(), "width": 48,
         "height": 48, "raw_caption": scene.raw_caption}
        for i, scene in enumerate(scenes)
    ]  # fmt: skip
    said: list[dict[str, Any]] = [
        {"id": f"{i:064x}", "status": REJECTED, "captions": []} if i % 5 == 4
        else {"id": f"{i:064x}", "captions": ["", describe(scene.reading)]}
        for i, scene in enumerate(scenes)
    ]  # fmt: skip
    table = write_table(
        root / "images-1", "images/2", [images[c : c + partition_rows] for c in cuts]
    )
    writer = TableWriter.under(
        open_folder(root), "captions", "captions/2", {}, {"images": table},
    )  # fmt: skip
    for k, c in enumerate(cuts):
        writer.write(k, make_rows("captions/2", said[c : c + partition_rows]))
    return {"images": table, "captions": writer.commit()}


def write_prompts(path: Path) -> Path:
    """Five prompts of three tags, as GenEval writes them."""

    def one(name: str, **more: Any) -> dict[str, Any]:
        return {"class": name, "count": 1, **more}

    lines = [
        {"tag": "single_object", "include": [one("three")], "prompt": "a red three"},
        {"tag": "single_object", "include": [one("six")], "prompt": "a blue six"},
        {"tag": "counting", "include": [one("two", count=2)],
         "exclude": [one("two", count=3)], "prompt": "two twos"},
        {"tag": "counting", "include": [one("one", count=2)], "prompt": "two ones"},
        {"tag": "position", "include": [one("five"), one("two", color="white",
         position=["above", 0])], "prompt": "a white two above a five"},
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def write_clip(folder: Path) -> str:
    """A CLIP of random weights that reads letters."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")
                  ).save_pretrained(folder)  # fmt: skip
    CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)
    small = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=small | {
                "vocab_size": len(words), "max_position_embeddings": 60,
                "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1,
            },
            vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=8,
        )  # fmt: skip
        CLIPModel(config).save_pretrained(folder)
    return str(folder)


def find_bright(picture: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """A detector of one's own: the whole picture is a three, or a two if it is bright."""
    height, width, _ = picture.shape
    name = "two" if picture.mean() > 100 else "three"
    return [{"class": name, "box": [0, 0, width, height], "score": 0.95}]


class CountingDetector:
    """One that is made once a worker."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, picture: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
        self.seen += 1
        return find_bright(picture)


def find_nonsense(picture: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """One whose boxes have two numbers."""
    return [{"class": "three", "box": list(picture.shape[:2])}]
