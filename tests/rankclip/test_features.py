"""Features of a CLIP checkpoint of ours, for other rooms' metrics."""

from pathlib import Path

import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.metrics.similarity import fit_pictures
from mmtrain.rankclip.features import ClipFeatures
from mmtrain.rankclip.networks import build_clip, encode_images
from tests.rankclip.tiny import TINY, build, lightning

PICTURES = torch.randint(256, (3, 3, 40, 70), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
JSON = "rn_small.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    torch.save(lightning(build_clip(JSON).state_dict(), "network.", architecture=JSON), path)
    return path


def test_both_towers_of_our_checkpoint(checkpoint: Path) -> None:
    before = torch.get_rng_state()
    features = ClipFeatures(str(checkpoint))
    images = torch.nn.functional.normalize(features.image_features(PICTURES), dim=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(0)
    network = build_clip(JSON).eval()
    size = network.visual.image_size
    size = size if isinstance(size, int) else size[0]
    with torch.no_grad():
        expected = encode_images(network, (fit_pictures(PICTURES, size) * 255).round().to(torch.uint8))
    torch.testing.assert_close(images, expected)
    texts = features.text_features(["a red fox", "word " * 100])
    assert texts.shape == (2, images.shape[1])
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
    assert "last.ckpt" in features.name


def test_mistakes_are_told(checkpoint: Path, architectures: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.ckpt: no such file"):
        ClipFeatures("absent.ckpt")
    with pytest.raises(UserError, match="image_size: 33"):
        ClipFeatures(str(checkpoint), image_size=33).image_features(PICTURES)
    with pytest.raises(UserError, match="does not fit"):
        ClipFeatures(str(checkpoint), TINY).image_features(PICTURES)
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a CLIP model"):
        ClipFeatures(str(tmp_path / "other.pt")).image_features(PICTURES)
    torch.save(build("vit_tiny").state_dict(), tmp_path / "tiny.pt")
    with pytest.raises(UserError, match="vocabulary of"):
        ClipFeatures(str(tmp_path / "tiny.pt"), TINY).text_features(["a fox"])
