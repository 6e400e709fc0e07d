"""SlowOnly ResNet-50, the video encoder of CAVP (Diff-Foley, arXiv 2306.17203), with the released weight names.

Shapes: B batch, T frames, C channels. Frames are folded into the batch, [B * T, C, H, W] in channels-last memory: a
(1, k, k) convolution is then a 2-D one, and a (3, 1, 1) convolution is a 2-D one over a view [B, C, T, H * W].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.recompute import recomputed

EXPANSION = 4
STAGES = (3, 4, 6, 3)  # bottlenecks
RECEPTIVE_FRAMES = 9  # frames on either side that a feature depends on: one for each of the 9 temporal convolutions


class FoldedConv3d(nn.Conv3d):
    """A Conv3d, (1, k, k) or (3, 1, 1), without bias, over folded frames [B * T, C, H, W]."""

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """[B * T, C, H, W] to [B * T, C', H', W']; `frames` is T."""
        if self.kernel_size[0] == 1:
            return F.conv2d(x, self.weight.squeeze(2), stride=self.stride[1:], padding=self.padding[1:])
        _, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, frames, height * width, channels)  # a view of channels-last memory
        out = F.conv2d(rows.permute(0, 3, 1, 2), self.weight.squeeze(4), padding=(self.padding[0], 0))
        return out.permute(0, 2, 3, 1).reshape(-1, height, width, self.out_channels).permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """Convolution and BatchNorm; over folded frames the 2-D norm has the statistics of the 3-D one."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int], stride: int = 1) -> None:
        super().__init__()
        padding = tuple(k // 2 for k in kernel)
        self.conv = FoldedConv3d(inputs, outputs, kernel, stride=(1, stride, stride), padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """[B * T, C, H, W] to [B * T, C', H', W']."""
        return self.bn(self.conv(x, frames))


class Bottleneck(nn.Module):
    """(t, 1, 1), (1, 3, 3) and (1, 1, 1) convolutions beside an identity; t is 1 or, with `temporal`, 3."""

    def __init__(self, inputs: int, width: int, stride: int, temporal: bool, is_first: bool) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, width, (3 if temporal else 1, 1, 1))
        self.conv2 = ConvNorm(width, width, (1, 3, 3), stride)
        self.conv3 = ConvNorm(width, EXPANSION * width, (1, 1, 1))
        if is_first:
            self.downsample = ConvNorm(inputs, EXPANSION * width, (1, 1, 1), stride)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """[B * T, C, H, W] to [B * T, 4 * width, H', W']."""
        identity = self.downsample(x, frames) if hasattr(self, "downsample") else x
        x = F.relu(self.conv1(x, frames), inplace=True)
        x = F.relu(self.conv2(x, frames), inplace=True)
        return F.relu(self.conv3(x, frames) + identity, inplace=True)


class SlowOnly(nn.Module):
    """Depth 50, no temporal stride: one feature a frame.

    Args:
        width: channels of the stem; 64 is the released network.
        gradient_checkpointing: run each bottleneck again in the backward pass instead of keeping its activations.
    """

    def __init__(self, width: int = 64, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.conv1 = ConvNorm(3, width, (1, 7, 7), 2)
        inputs = width
        for stage, num_blocks in enumerate(STAGES):
            blocks = nn.ModuleList()
            for index in range(num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Bottleneck(inputs, width << stage, stride, stage >= 2, index == 0))
                inputs = EXPANSION * (width << stage)
            setattr(self, f"layer{stage + 1}", blocks)
        self.out_channels = inputs

    def stem(self, video: Tensor) -> Tensor:
        """[B, T, 3, H, W] to [B * T, width, H / 4, W / 4]."""
        x = video.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = F.relu(self.conv1(x, video.shape[1]), inplace=True)
        return F.max_pool2d(x, 3, stride=2, padding=1)

    def stage(self, number: int, x: Tensor, frames: int) -> Tensor:
        """Stage 1 to 4 on folded frames."""
        for block in getattr(self, f"layer{number}"):
            x = recomputed(block, block, x, frames) if self.gradient_checkpointing else block(x, frames)
        return x

    def forward(self, video: Tensor) -> Tensor:
        """Features of each frame.

        Args:
            video: float [B, T, 3, H, W] in [0, 1], without further normalisation; H and W from 32, any T.

        Returns:
            [B, T, 32 * width], the mean over height and width.
        """
        x, frames = self.stem(video), video.shape[1]
        for number in range(1, len(STAGES) + 1):
            x = self.stage(number, x, frames)
        return x.mean(dim=(2, 3)).unflatten(0, (-1, frames))
