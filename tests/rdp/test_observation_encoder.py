"""The observation encoder against the official one, and what it does to pictures."""

import numpy as np
import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.rdp.observation_encoder import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    ObservationEncoder,
    normalise_pictures,
    random_crop,
)
from tests.golden import load
from tests.golden.fill import array
from tests.rdp.test_networks_golden import filled, shapes

SIZE = (48, 64)


def golden_pictures(name: str) -> torch.Tensor:
    return torch.from_numpy(np.clip(0.5 + 0.2 * array(name, (2, 3, *SIZE)), 0, 1))[:, None]


def test_golden() -> None:
    encoder = filled(
        ObservationEncoder({"left_wrist_img": SIZE, "left_gripper1_img": SIZE}, {"pose": 3}, image_norm="reference")
    )
    assert {k: list(v.shape) for k, v in encoder.state_dict().items()} == shapes("obs_encoder")
    assert encoder.crops == {"left_gripper1_img": SIZE, "left_wrist_img": (43, 57)} and encoder.feature_dim == 1027
    features = encoder(
        {
            "left_wrist_img": golden_pictures("enc.wrist"),
            "left_gripper1_img": golden_pictures("enc.gripper"),
            "pose": torch.from_numpy(array("enc.pose", (2, 3)))[:, None],
        }
    )
    np.testing.assert_allclose(features.detach().numpy(), load("rdp/obs_encoder.npz")["features"], rtol=0, atol=2e-5)


def test_two_observations_one_after_the_other() -> None:
    torch.manual_seed(0)
    encoder = ObservationEncoder({"wrist_img": (64, 64)}, {"width": 1, "pose": 3}, backbone="small").eval()
    observation = {
        "wrist_img": torch.randint(256, (3, 2, 3, 64, 64), dtype=torch.uint8),
        "pose": torch.randn(3, 2, 3),
        "width": torch.randn(3, 2, 1),
    }
    both = encoder(observation)
    newest = encoder({key: value[:, 1:] for key, value in observation.items()})
    assert both.shape == (3, 2 * 68) and encoder.feature_dim == 68
    torch.testing.assert_close(both[:, 68:], newest)
    assert torch.equal(newest[:, 64:], torch.cat([observation["pose"][:, 1], observation["width"][:, 1]], -1))
    as_floats = encoder(observation | {"wrist_img": observation["wrist_img"] / 255})
    torch.testing.assert_close(both, as_floats, atol=1e-5, rtol=0)


def test_image_norms() -> None:
    pictures = torch.tensor([0.0, 0.25, 1.0]).expand(1, 3, 3, 3)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    torch.testing.assert_close(normalise_pictures(pictures, "corrected", False), (pictures - mean) / deviation)
    twice = normalise_pictures(pictures, "reference", False)
    torch.testing.assert_close(twice, (2 * pictures - 1 - mean) / deviation)
    assert twice.min() < -6 and twice.max() < 2.7
    for norm in ("corrected", "reference"):
        torch.testing.assert_close(normalise_pictures(pictures, norm, True), 2 * pictures - 1)


def test_random_crops_are_parts_of_their_own_picture() -> None:
    torch.manual_seed(0)
    rows, columns = torch.arange(20).view(1, 1, 20, 1), torch.arange(30).view(1, 1, 1, 30)
    pictures = (1000 * torch.arange(64).view(64, 1, 1, 1) + 30 * rows + columns).repeat(1, 2, 1, 1)
    crops = random_crop(pictures, (18, 27))
    assert crops.shape == (64, 2, 18, 27)
    corners = crops[:, :, :1, :1]
    inside = 30 * rows[:, :, :18] + columns[..., :27]
    assert torch.equal(crops - corners, inside.expand(64, 2, -1, -1))
    top, left = (corners[:, 0, 0, 0] % 1000) // 30, (corners[:, 0, 0, 0] % 1000) % 30
    assert torch.equal(corners[:, 0, 0, 0] // 1000, torch.arange(64))
    assert set(top.tolist()) == {0, 1, 2} and set(left.tolist()) == {0, 1, 2, 3}


def test_training_crops_cameras_but_not_touch() -> None:
    torch.manual_seed(0)
    pictures = torch.rand(8, 1, 3, 32, 32)
    for key, is_random in (("wrist_img", True), ("left_gripper1_img", False)):
        encoder = ObservationEncoder({key: (32, 32)}, {}, backbone="small").train()
        assert torch.equal(encoder({key: pictures}), encoder({key: pictures})) != is_random
        encoder.eval()
        assert torch.equal(encoder({key: pictures}), encoder({key: pictures}))


def test_bad_input() -> None:
    for kwargs, message in (
        ({"backbone": "vit"}, "backbone: vit is not known"),
        ({"image_norm": "none"}, "image_norm: none is not known"),
        ({"crop": 1.5}, "crop: 1.5"),
    ):
        with pytest.raises(UserError, match=message):
            ObservationEncoder({"wrist_img": (32, 32)}, {}, **kwargs)
    with pytest.raises(UserError, match="sees nothing"):
        ObservationEncoder({}, {})
    encoder = ObservationEncoder({"wrist_img": (32, 32)}, {"pose": 3}, backbone="small")
    with pytest.raises(UserError, match="pose is missing"):
        encoder({"wrist_img": torch.zeros(1, 2, 3, 32, 32)})
    with pytest.raises(UserError, match=r"wrist_img has shape \[3, 48, 32\].*takes \[3, 32, 32\]"):
        encoder({"wrist_img": torch.zeros(1, 2, 3, 48, 32), "pose": torch.zeros(1, 2, 3)})
