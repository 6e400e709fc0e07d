"""Feature networks: what reaches them, what their files may be, and that nothing is downloaded."""

import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from torch.nn.functional import cosine_similarity

from mmtrain.config_errors import UserError
from mmtrain.metrics.similarity import ImageFeatures, ImageTextFeatures, fit_pictures
from mmtrain.storyweaver.features import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DinoFeatures,
    EfficientNetLiteFeatures,
    OpenClipFeatures,
    RecogniserFeatures,
    standardised,
)

G = torch.Generator().manual_seed(0)
PICTURES = torch.randint(256, (3, 3, 40, 70), generator=G, dtype=torch.uint8)
TINY = {
    "embed_dim": 8,
    "vision_cfg": {"layers": 1, "width": 64, "image_size": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def clip_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A tiny architecture as a JSON file, and weights of it."""
    registry = open_clip.factory
    monkeypatch.setattr(registry, "_MODEL_CONFIG_PATHS", list(registry._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(registry, "_MODEL_CONFIGS", dict(registry._MODEL_CONFIGS))
    architecture = tmp_path / "mmtrain-test-tiny-clip.json"
    architecture.write_text(json.dumps(TINY))
    torch.manual_seed(0)
    network = open_clip.model.CLIP(**TINY)
    torch.save(network.state_dict(), tmp_path / "tiny.pt")
    return str(architecture), str(tmp_path / "tiny.pt")


def test_open_clip_from_a_file(clip_files: tuple[str, str]) -> None:
    architecture, weights = clip_files
    before = torch.get_rng_state()
    features = OpenClipFeatures(weights, architecture)
    images, texts = features.image_features(PICTURES), features.text_features(["A fox runs.", "", "word " * 200])
    assert images.shape == texts.shape == (3, 8) and images.dtype == torch.float32 and not images.requires_grad
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(0)
    network = open_clip.model.CLIP(**TINY).eval()
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    with torch.no_grad():
        expected = network.encode_image(standardised(fit_pictures(PICTURES, 32), mean, std))
        words = network.encode_text(open_clip.SimpleTokenizer()(["A fox runs."]))
    torch.testing.assert_close(images, expected)
    torch.testing.assert_close(texts[:1], words)
    squashed = OpenClipFeatures(weights, architecture, "squash").image_features(PICTURES)
    assert cosine_similarity(images, squashed).max() < 0.9999, "how a picture is fitted changes the numbers"
    assert "tiny.pt" in features.name and "crop" in features.name


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0).eval()


def test_dino_in_both_released_layouts(vit: torch.nn.Module, tmp_path: Path) -> None:
    bare = vit.state_dict()
    torch.save(bare, tmp_path / "backbone.pth")
    teacher = {f"module.backbone.{key}": value for key, value in bare.items()}
    teacher["module.head.mlp.0.bias"] = torch.ones(2)
    torch.save({"teacher": teacher, "student": {}, "epoch": 3}, tmp_path / "full.pth")
    with torch.no_grad():
        fitted = standardised(fit_pictures(PICTURES, 224, "crop", 256), IMAGENET_MEAN, IMAGENET_STD)
        expected = vit(fitted)  # timm pools by the class token
    for name in ("backbone", "full"):
        found = DinoFeatures(str(tmp_path / f"{name}.pth"), "vit_tiny_patch16_224").image_features(PICTURES)
        torch.testing.assert_close(found, expected)


def test_the_proxy_says_that_it_is_one() -> None:
    features = EfficientNetLiteFeatures(size=64)
    assert "proxy" in features.name
    found = features.image_features(torch.cat([PICTURES, PICTURES[:1]]))
    assert found.shape == (4, 1280) and found.std() > 0.01
    torch.testing.assert_close(found[3], found[0], rtol=1e-4, atol=1e-4)


def test_they_are_what_the_metrics_take() -> None:
    for kind in (OpenClipFeatures, DinoFeatures, EfficientNetLiteFeatures, RecogniserFeatures):
        assert callable(kind.image_features) and isinstance(kind.name, property)
    assert callable(OpenClipFeatures.text_features) and ImageFeatures and ImageTextFeatures


def test_mistakes_are_told(clip_files: tuple[str, str], tmp_path: Path) -> None:
    architecture, weights = clip_files
    other = Path(architecture).with_name("mmtrain-test-other-clip.json")
    other.write_text(json.dumps(TINY | {"embed_dim": 16}))
    for kind in (OpenClipFeatures, DinoFeatures):
        with pytest.raises(UserError, match=r"weights: no file is given, and nothing is downloaded"):
            kind()
        with pytest.raises(UserError, match=r"absent\.pt: no such file"):
            kind("absent.pt")
        with pytest.raises(UserError, match="crop, pad, squash"):
            kind(weights, resize="stretch")
    with pytest.raises(UserError, match="nearest: ViT-B-32"):
        OpenClipFeatures(weights, "ViT-B-33").image_features(PICTURES)
    with pytest.raises(UserError, match=r"tiny\.pt: cannot be read as mmtrain-test-other-clip"):
        OpenClipFeatures(weights, str(other)).image_features(PICTURES)
    with pytest.raises(UserError, match=r"tiny\.pt: does not fit vit_tiny_patch16_224"):
        DinoFeatures(weights, "vit_tiny_patch16_224").image_features(PICTURES)
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"broken\.pth: cannot be read"):
        DinoFeatures(str(tmp_path / "broken.pth"), "vit_tiny_patch16_224").image_features(PICTURES)
    with pytest.raises(UserError, match=r"RecogniserFeatures\.checkpoint"):
        RecogniserFeatures("absent.ckpt")


def test_configs_name_them_by_class_path(clip_files: tuple[str, str]) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--image", type=ImageFeatures | None)
    parser.add_argument("--both", type=ImageTextFeatures | None)
    module, weights = "mmtrain.storyweaver.features", clip_files[1]
    given = {"class_path": f"{module}.OpenClipFeatures", "init_args": {"weights": weights, "resize": "pad"}}
    found = parser.instantiate_classes(
        parser.parse_object({"image": {"class_path": f"{module}.EfficientNetLiteFeatures"}, "both": given})
    )
    assert found.image.size == 224 and found.both.resize == "pad"
