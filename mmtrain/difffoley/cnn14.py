"""Cnn14 of PANNs as CAVP changes it (Diff-Foley, arXiv 2306.17203), with the released weight names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.recompute import recomputed

POOLS = ((2, 2), (2, 2), (2, 2), (2, 2), (1, 2), (1, 1))  # time, mel bins
TIME_STRIDE = 16


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, then average pooling."""

    def __init__(self, inputs: int, outputs: int, pool: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.pool = pool
        for conv in (self.conv1, self.conv2):
            nn.init.xavier_uniform_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, time, mel] to [B, C', time / pool, mel / pool]."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return x if self.pool == (1, 1) else F.avg_pool2d(x, self.pool)


class Cnn14(nn.Module):
    """Spectrogram encoder, one feature for 16 mel frames.

    The released network applies `fc1` twice in a row, and its `bn` is no layer of PANNs (whose bn0 has 64 bins); the
    weights were trained so, so it stays.

    Args:
        width: channels of the first block; 64 is the released network.
        mel_bins: bins of the spectrogram, at least 32.
        feature_dim: width of the features.
        gradient_checkpointing: run each block again in the backward pass instead of keeping its activations.
        dropout: after each block, in training. Narrow networks learn little with the released 0.2.
    """

    def __init__(
        self,
        width: int = 64,
        mel_bins: int = 128,
        feature_dim: int = 512,
        gradient_checkpointing: bool = False,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing, self.dropout = gradient_checkpointing, dropout
        self.bn = nn.BatchNorm2d(mel_bins)
        inputs = 1
        for index, pool in enumerate(POOLS):
            setattr(self, f"conv_block{index + 1}", ConvBlock(inputs, width << index, pool))
            inputs = width << index
        self.fc1 = nn.Linear(inputs, inputs)
        self.final_project = nn.Linear(inputs, feature_dim)
        for layer in (self.fc1, self.final_project):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, mel: Tensor) -> Tensor:
        """Features of each 16 mel frames.

        Args:
            mel: float [B, mel_bins, F] in [0, 1], F at least 16.

        Returns:
            [B, F // 16, feature_dim].
        """
        x = self.bn(mel[..., None]).permute(0, 3, 2, 1)  # [B, 1, time, mel]
        x = x.contiguous(memory_format=torch.channels_last)
        for index in range(len(POOLS)):
            block = getattr(self, f"conv_block{index + 1}")
            x = recomputed(block, block, x) if self.gradient_checkpointing else block(x)
            x = F.dropout(x, self.dropout, self.training)
        x = x.mean(dim=3)
        x = F.max_pool1d(x, 3, 1, 1) + F.avg_pool1d(x, 3, 1, 1)
        x = x.transpose(1, 2)
        x = F.relu(self.fc1(F.relu(self.fc1(x))))
        return self.final_project(x)
