"""Revisions: other weights or texts are told apart without a model being loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pixart_models.captioner import SPEC
from pixart_models.revision import check_revision, model_revision, revision_of
from pixart_models.text import ModelFiles, ModelNotFound


def write_model(folder: Path, **changes: float) -> Path:
    """Three tensors of which one may be changed, a config, and a tokenizer beside."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.zeros(200, 50) for name in ("first", "middle", "last")}
    for name, value in changes.items():
        tensors[name][0, 0] = value
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llava"}')
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder


def revision(folder: Path) -> str:
    return revision_of(ModelFiles(folder, folder, ()))


def test_each_tensor_each_text_and_the_tokenizer_count(tmp_path: Path) -> None:
    found = {revision(write_model(tmp_path / "m"))}
    assert found == {revision(write_model(tmp_path / "copy"))}, "places do not count"
    for name in ("first", "middle", "last"):
        found.add(revision(write_model(tmp_path / "m", **{name: 1e-30})))
    write_model(tmp_path / "m")
    (tmp_path / "m" / "tokenizer" / "tokenizer.json").write_text("[]")
    found.add(revision(tmp_path / "m"))
    (tmp_path / "m" / "config.json").write_text("{}")
    found.add(revision(tmp_path / "m"))
    assert len(found) == 6


def test_only_a_commit_of_the_hubs_cache_is_taken_for_one(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    assert revision(write_model(tmp_path / "snapshots" / commit)) == commit
    assert revision(write_model(tmp_path / "snapshots" / "my-vae")) != "my-vae"


def test_a_broken_weights_file_has_a_revision_too(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    assert len(revision(folder)) == 16


def test_a_machine_with_other_weights_is_refused(tmp_path: Path) -> None:
    folder = str(write_model(tmp_path / "m"))
    wanted = model_revision(SPEC, folder)
    check_revision(SPEC, folder, wanted)
    write_model(tmp_path / "m", last=1.0)
    with pytest.raises(ModelNotFound, match=rf"but this table is made with {wanted}; put the same"):
        check_revision(SPEC, folder, wanted)
