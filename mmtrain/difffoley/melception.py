"""Melception: Inception v3 on mel spectrograms, the feature network of IS, FID and KL in SpecVQGAN (arXiv 2110.08791).

Names and shapes are those of the released checkpoint, so that it loads strictly.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.inception import (
    BasicConv2d,
    InceptionA,
    InceptionAux,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

from mmtrain.checkpoint import state_difference
from mmtrain.config_errors import UserError
from mmtrain.difffoley.checkpoints import read_file

NUM_CLASSES = 309  # of VGGSound
MIN_FRAMES = 23  # with fewer a stride has nothing left

# Of each of the 80 mel bins of VGGSound (preset `mel_specvqgan`, values in [0, 1]), from the released SpecVQGAN code.
# fmt: off
MEANS = (
    0.512347102, 0.526301026, 0.520029366, 0.518318653, 0.52457267, 0.511292338, 0.514037549, 0.511894047,
    0.501422226, 0.506323993, 0.497244, 0.490621299, 0.499711126, 0.484429032, 0.485983014, 0.486816287,
    0.474361181, 0.480313599, 0.474228114, 0.463693976, 0.474130541, 0.46062687, 0.45677793, 0.461354733,
    0.452468008, 0.452327669, 0.452083856, 0.443516701, 0.446673155, 0.444476932, 0.436763644, 0.44002381,
    0.437724143, 0.43061018, 0.431208283, 0.426032722, 0.428632349, 0.42296207, 0.417333305, 0.418041199,
    0.416050673, 0.40875265, 0.406669974, 0.404074639, 0.403533101, 0.397080302, 0.393750668, 0.393010914,
    0.39047116, 0.384616792, 0.381452829, 0.379852086, 0.374195248, 0.370805979, 0.367865354, 0.3656905,
    0.363360792, 0.357751906, 0.355048001, 0.352848172, 0.345948637, 0.341123134, 0.337848872, 0.330957025,
    0.325594604, 0.320031047, 0.315062225, 0.311380774, 0.304035157, 0.299695402, 0.295780241, 0.288618714,
    0.285816848, 0.279222518, 0.274440348, 0.273394674, 0.265717596, 0.262808651, 0.256642014, 0.248535126,
)
DEVIATIONS = (
    0.0818760097, 0.0839320123, 0.0853319094, 0.0865136608, 0.0879570022, 0.0892404616, 0.0901156515, 0.0913896486,
    0.0921537876, 0.0925109163, 0.0935659036, 0.0933305696, 0.0944641083, 0.0940019712, 0.0947785303, 0.0948784798,
    0.0942444727, 0.0941747501, 0.0949806124, 0.0936241522, 0.0945382491, 0.0948122591, 0.0935946405, 0.094379127,
    0.0938401371, 0.0943824723, 0.0941971987, 0.0934088007, 0.0942318365, 0.0934446082, 0.0926526636, 0.0930792466,
    0.092993632, 0.0923616588, 0.0915649086, 0.0916140303, 0.0915052965, 0.0910253599, 0.090483658, 0.090250127,
    0.0907886922, 0.0898533836, 0.0887756571, 0.0896166712, 0.0885927528, 0.0882781819, 0.0883399919, 0.0876065418,
    0.0881232694, 0.0878228769, 0.0864548385, 0.087182112, 0.0864442065, 0.0853245407, 0.0859282166, 0.0845206901,
    0.0847427174, 0.0847639218, 0.0833465382, 0.0841211006, 0.0836725384, 0.0825225115, 0.083209753, 0.082577683,
    0.0817125291, 0.0820487216, 0.0809854493, 0.0815291703, 0.0820913464, 0.0807326585, 0.082258217, 0.0832407624,
    0.0805848911, 0.0851534978, 0.0835505575, 0.0806763768, 0.085369207, 0.0810761973, 0.0835746825, 0.0855604112,
)
# fmt: on


class Melception(nn.Module):
    """Inception v3 in torchvision's layout with one input channel and without the two early max-pools.

    The auxiliary head is a part of the checkpoint; no output uses it (the released training overwrote its loss).

    Args:
        num_classes: of the last layer.
        dropout: before the last layer, while training.
    """

    def __init__(self, num_classes: int = NUM_CLASSES, dropout: float = 0.5) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(1, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, kernel_size=3)
        self.Mixed_5b = InceptionA(192, pool_features=32)
        self.Mixed_5c = InceptionA(256, pool_features=64)
        self.Mixed_5d = InceptionA(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, channels_7x7=128)
        self.Mixed_6c = InceptionC(768, channels_7x7=160)
        self.Mixed_6d = InceptionC(768, channels_7x7=160)
        self.Mixed_6e = InceptionC(768, channels_7x7=192)
        self.AuxLogits = InceptionAux(768, num_classes)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280)
        self.Mixed_7c = InceptionE(2048)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, num_classes)
        # not persistent: the released file does not hold them
        self.register_buffer("bin_means", torch.tensor(MEANS), persistent=False)
        self.register_buffer("bin_deviations", torch.tensor(DEVIATIONS), persistent=False)

    def standardise(self, mel: Tensor) -> Tensor:
        """Mel [B, 80, F] in [0, 1] as the network takes it: each bin less its mean, over its deviation."""
        return (mel - self.bin_means[:, None]) / self.bin_deviations[:, None]

    def forward(self, mel: Tensor, standardised: bool = False) -> dict[str, Tensor]:
        """Features of spectrograms.

        Args:
            mel: [B, 80, F] of preset `mel_specvqgan`, F >= 23.
            standardised: whether the bins are standardised already; else `mel` is in [0, 1].

        Returns:
            "64", "192", "768", "2048": means over the map [B, width] after Conv2d_2b, Conv2d_4a, Mixed_6e, Mixed_7c;
            "logits_unbiased" and "logits" [B, num_classes] without and with the bias of the last layer.

        Raises:
            ValueError: not 80 bins, or fewer frames than the strides need.
        """
        if mel.ndim != 3 or mel.shape[1] != len(MEANS) or mel.shape[2] < MIN_FRAMES:
            raise ValueError(f"expected [B, {len(MEANS)}, F >= {MIN_FRAMES}], got {list(mel.shape)}")
        x = (mel if standardised else self.standardise(mel))[:, None]
        features = {}
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        features["64"] = x.mean(dim=(2, 3))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        features["192"] = x.mean(dim=(2, 3))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        features["768"] = x.mean(dim=(2, 3))
        features["2048"] = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))
        unbiased = self.dropout(features["2048"]) @ self.fc.weight.T
        return features | {"logits_unbiased": unbiased, "logits": unbiased + self.fc.bias}


def is_released_melception(content: Mapping[str, Any]) -> bool:
    """Whether a file holds the weights as the released one does, under `model`."""
    model = content.get("model")
    return isinstance(model, Mapping) and "Mixed_7c.branch1x1.conv.weight" in model


def load_melception(path: str | Path, where: str = "feature_network") -> Melception:
    """The released network, or another file `{"model": state}` of its layout with any number of classes; frozen, eval.

    Args:
        where: the setting that named the file, for messages.

    Raises:
        UserError: no such file, not of that layout, or of other shapes.
    """
    content = read_file(path, where)
    if not is_released_melception(content):
        raise UserError(f"{where}: {path}: holds no melception; expected its weights under 'model'")
    state = content["model"]
    network = Melception(len(state["fc.weight"]))
    expected = {key: value.shape for key, value in network.state_dict().items()}
    if difference := state_difference(expected, state):
        raise UserError(f"{where}: {path}: is not a melception: {difference}")
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)
