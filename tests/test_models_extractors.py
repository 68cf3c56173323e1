"""Feature extractors: the same vector for the same picture, and no pickle is ever trusted."""

import hashlib
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import write_clip
from numpy.typing import NDArray

from pixart_jobs.scenes import compose_scene
from pixart_models import extractors
from pixart_models.config import ModelInputError
from pixart_models.extractors import (
    CLIP,
    INCEPTION_FILE,
    PCA,
    ClipScorer,
    PcaExtractor,
    extractor_revision,
    load_extractor,
)
from pixart_models.text import ModelNotFound

Pictures = list[NDArray[np.uint8]]


def make_pictures(count: int) -> Pictures:
    return [compose_scene(i, seed=2).image for i in range(count)]


def test_components_are_orthogonal_centred_and_of_mean_variance_one(tmp_path: Path) -> None:
    pictures = make_pictures(80)
    fitted = PcaExtractor.fit(pictures)
    features = fitted.extract(pictures)
    assert features.shape == (80, 64)
    covariance = np.cov(features, rowvar=False)
    variances = np.diag(covariance)
    assert variances.mean() == pytest.approx(1, rel=1e-4)
    assert np.all(np.diff(variances) < 1e-5), "largest first"
    assert np.abs(covariance - np.diag(variances)).max() < 1e-3
    assert np.abs(features.mean(axis=0)).max() < 1e-4
    assert PcaExtractor.fit(pictures).dump() == fitted.dump()
    (tmp_path / "x.safetensors").write_bytes(fitted.dump())
    again = load_extractor(PCA, fitted=tmp_path / "x.safetensors").extract(pictures)
    assert np.array_equal(again, features)


def test_few_pictures_have_few_components_and_equal_ones_none() -> None:
    assert PcaExtractor.fit(make_pictures(9)).extract(make_pictures(3)).shape == (3, 8)
    with pytest.raises(ModelInputError, match="the 9 reference pictures are all alike"):
        PcaExtractor.fit(make_pictures(1) * 9)


def test_a_damaged_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(PcaExtractor.fit(make_pictures(9)).dump()[:40])
    with pytest.raises(ModelNotFound, match="delete it and evaluate again"):
        load_extractor(PCA, fitted=path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


def test_a_folder_with_an_image_model_is_an_extractor(clip: str) -> None:
    pictures = make_pictures(3)
    features = load_extractor(clip).extract(pictures)
    assert features.shape == (3, 8)
    assert features.dtype == np.float32
    assert not np.allclose(features[0], features[1])
    assert len(extractor_revision(clip)) == 16


def test_dinov2_gives_its_pooled_token(tmp_path: Path) -> None:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    model = Dinov2Model(Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )).eval()  # fmt: skip
    model.save_pretrained(tmp_path)
    processor = BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor.save_pretrained(tmp_path)
    pictures = make_pictures(2)
    pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = model(pixels).pooler_output.numpy()
    np.testing.assert_allclose(load_extractor(str(tmp_path)).extract(pictures), wanted, atol=1e-5)


def test_clip_scores_are_torchmetrics_own(clip: str) -> None:
    from torchmetrics.functional.multimodal import clip_score
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    class Old(torch.nn.Module):
        """Answers as transformers 4 did, which is what torchmetrics 1.9 understands."""

        def __init__(self) -> None:
            super().__init__()
            self.model: Any = CLIPModel.from_pretrained(clip).eval()
            self.config = self.model.config

        def get_image_features(self, *given: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model.get_image_features(*given).pooler_output
            return found

        def get_text_features(self, *given: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model.get_text_features(*given).pooler_output
            return found

    processor = CLIPProcessor(
        CLIPImageProcessorPil.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)
    )
    old: Callable[[], Any] = lambda: (Old(), processor)  # noqa: E731
    pictures, texts = make_pictures(3), ["a red three", "blue", "nothing at all"]
    found = ClipScorer(clip).score(pictures, texts)
    for picture, text, score in zip(pictures, texts, found, strict=True):
        shown = torch.from_numpy(picture.copy()).permute(2, 0, 1)
        wanted = float(clip_score(shown, text, model_name_or_path=old))
        assert max(score, 0) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_a_long_text_is_cut_to_what_the_model_reads(clip: str) -> None:
    (one,) = ClipScorer(clip).score(make_pictures(1), ["x " * 500])
    (two,) = ClipScorer(clip).score(make_pictures(1), ["x " * 900])
    assert one == two


def test_a_folder_of_pickles_is_refused_and_never_read(tmp_path: Path, clip: str) -> None:
    shutil.copy(f"{clip}/config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelNotFound, match="holds only pytorch_model"):
        load_extractor(str(tmp_path))
    assert not Trap.sprung


class Trap:
    """What unpickling would run."""

    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return spring, ()


def spring() -> None:
    Trap.sprung = True


def test_what_is_not_there_or_no_clip_is_named(tmp_path: Path, clip: str) -> None:
    with pytest.raises(ModelNotFound, match="cannot load the feature extractor 'no/where'"):
        extractor_revision("no/where")
    with pytest.raises(ModelNotFound, match="of those built in there is builtin:pca"):
        extractor_revision("builtin:inception")
    shutil.copytree(clip, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "clip"', '"model_type": "t5"'))
    with pytest.raises(ModelNotFound, match="holds a 't5', but a 'clip' is needed"):
        extractor_revision(str(tmp_path / "other"), CLIP)


def save_inception(folder: Path, content: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that takes the official one's place, its digest included."""
    torch.save(content, folder / INCEPTION_FILE)
    digest = hashlib.sha256((folder / INCEPTION_FILE).read_bytes()).hexdigest()
    monkeypatch.setattr(extractors, "_INCEPTION_SHA256", digest[:8])


def test_inception_is_the_official_file_its_tensors_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    (tmp_path / INCEPTION_FILE).write_bytes(b"another")
    with pytest.raises(ModelNotFound, match="is not the official file: its SHA-256 is another"):
        load_extractor(str(tmp_path))
    save_inception(tmp_path, Trap(), monkeypatch)
    with pytest.raises(ModelNotFound, match=INCEPTION_FILE):
        load_extractor(str(tmp_path))
    assert not Trap.sprung

    with monkeypatch.context() as patch:  # the class loads weights as it is made: random ones here
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    save_inception(tmp_path, network.state_dict(), monkeypatch)
    pictures = make_pictures(2)
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    wanted = network(pixels)[0].numpy()
    assert wanted.shape == (2, 2048)
    np.testing.assert_allclose(load_extractor(str(tmp_path)).extract(pictures), wanted, atol=1e-5)
