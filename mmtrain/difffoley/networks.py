"""The networks of the second stage of Diff-Foley (arXiv 2306.17203): condition embedder, UNet, alignment classifier.

Shapes: B batch, T video features, D their width, W width of the condition, h rows (mel) and w columns (time) of a
latent. Both networks are Stable Diffusion v1's UNet, or its encoder half, in the classes of diffusers.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2DCrossAttn, get_down_block
from torch import Tensor, nn

from mmtrain.config_errors import UserError
from mmtrain.video_audio import ClipFormat

NullCondition = Literal["embedded_zeros", "raw_zeros", "learned"]
NULL_CONDITIONS = ("embedded_zeros", "raw_zeros", "learned")
GROUPS = 32  # of every GroupNorm


class ConditionEmbedder(nn.Module):
    """Tokens [B, T, W] of video features [B, T, D]: a linear map plus a learned vector for each position from 0.

    Args:
        feature_dim: D.
        width: W.
        max_frames: most features that it takes.
        feature_scale: factor of the features, 1 as released. The features have unit length, so their entries are about
            1/sqrt(D) where the positions start at 1: sqrt(D) makes both count alike in a training from scratch.
    """

    def __init__(
        self, feature_dim: int = 512, width: int = 768, max_frames: int = 40, feature_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.embedder = nn.Sequential(nn.Linear(feature_dim, width))  # names of the released checkpoints
        self.pos_emb = nn.Embedding(max_frames, width)
        self.feature_scale = feature_scale

    def forward(self, features: Tensor) -> Tensor:
        """Tokens of features [B, T, D].

        Raises:
            UserError: more features than positions, or of another width.
        """
        frames, width = features.shape[1:]
        if frames > self.pos_emb.num_embeddings:
            raise UserError(
                f"network.max_frames: {frames} features were given, the network has {self.pos_emb.num_embeddings} "
                "positions: cut the video into windows, or train with more"
            )
        if width != self.embedder[0].in_features:
            raise UserError(
                f"network.feature_dim: features of width {width} were given, the network takes "
                f"{self.embedder[0].in_features}: give the features that it was trained with"
            )
        return self.embedder(self.feature_scale * features) + self.pos_emb.weight[:frames]


class FrameCondition(nn.Module):
    """Channels beside a latent that say what the video shows at each of its columns, after MMAudio (arXiv 2412.15322).

    Not in Diff-Foley, whose latent meets the video in cross-attention only. A linear map of the tokens is interpolated
    in time; columns before the first and after the last feature take the nearest one.

    Args:
        width: W of the tokens.
        channels: channels that are added.
        columns_per_feature: latent columns that one feature spans, 1.953 in the paper's units (16000 Hz, hop 256,
            factor 8, 4 features/s). None stretches whatever features there are over whatever columns there are, which
            shifts 32 features over 64 columns by up to 0.19 s.
    """

    def __init__(self, width: int, channels: int, columns_per_feature: float | None = None) -> None:
        super().__init__()
        self.projection = nn.Linear(width, channels)
        self.columns_per_feature = columns_per_feature

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, c, h, w] with the channels of context [B, T, W] behind its own."""
        rows, columns = x.shape[-2:]
        added = resample_tokens(self.projection(context), columns, self.columns_per_feature)
        return torch.cat([x, added.transpose(1, 2)[:, :, None].expand(-1, -1, rows, -1).to(x)], 1)


def resample_tokens(tokens: Tensor, columns: int, columns_per_feature: float | None = None) -> Tensor:
    """Tokens [B, T, c] at the middles of `columns` latent columns [B, columns, c], linearly interpolated in time."""
    frames = tokens.shape[1]
    ratio = columns_per_feature or columns / frames
    position = (torch.arange(columns, device=tokens.device, dtype=torch.float32) + 0.5) / ratio - 0.5
    position = position.clamp(0, frames - 1)
    before = position.floor().long()
    after = (before + 1).clamp(max=frames - 1)
    share = (position - before).to(tokens)[:, None]
    return torch.lerp(tokens[:, before], tokens[:, after], share)


class FoleyUNet(nn.Module):
    """The denoiser: predicts noise, velocity or flow, of the shape of the latent; the defaults are Stable Diffusion v1.

    Args:
        feature_dim: D of the video features.
        latent_channels: channels of the latent.
        block_out_channels: width of each level; each level but the last halves h and w.
        layers_per_block: residual blocks of a level.
        attention_levels: the levels that look at the video.
        heads: attention heads, on all levels.
        context_width: W of the tokens.
        max_frames: most features of a window.
        condition_channels: channels of `FrameCondition`; 0 is the paper's network exactly.
        columns_per_feature: see `FrameCondition`.
        feature_scale: see `ConditionEmbedder`.
        gradient_checkpointing: recompute activations in the backward pass, which saves memory and takes more time.

    `null_token` takes part only where the null condition is "learned"; elsewhere it gets no gradient, so freeze it.
    """

    def __init__(
        self,
        feature_dim: int = 512,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        attention_levels: Sequence[bool] = (True, True, True, False),
        heads: int = 8,
        context_width: int = 768,
        max_frames: int = 40,
        condition_channels: int = 0,
        columns_per_feature: float | None = None,
        feature_scale: float = 1.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_levels(block_out_channels, attention_levels, heads)
        self.unet = UNet2DConditionModel(
            in_channels=latent_channels + condition_channels,
            out_channels=latent_channels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            down_block_types=tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention_levels),
            up_block_types=tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention_levels)),
            attention_head_dim=heads,  # in this class it means the number of heads
            cross_attention_dim=context_width,
        )
        self.embedder = ConditionEmbedder(feature_dim, context_width, max_frames, feature_scale)
        self.null_token = nn.Parameter(0.02 * torch.randn(context_width))
        self.frame_condition = (
            FrameCondition(context_width, condition_channels, columns_per_feature) if condition_channels else None
        )
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()

    def context(self, features: Tensor) -> Tensor:
        """Tokens [B, T, W] of video features [B, T, D]."""
        return self.embedder(features)

    def null_context(self, kind: NullCondition, batch: int, frames: int) -> Tensor:
        """Tokens [B, T, W] that stand for no video.

        Args:
            kind: "raw_zeros": of zero features, bias and positions, what the released training dropped to;
                "embedded_zeros": zeros in place of tokens, what the released sampling uses although the network never
                saw it in training; "learned": `null_token` at each position, one definition for both.

        Raises:
            UserError: another kind.
        """
        if kind not in NULL_CONDITIONS:
            raise UserError(f"null_condition: {kind}, expected one of {', '.join(NULL_CONDITIONS)}")
        if kind == "learned":
            return self.null_token.expand(batch, frames, -1)
        if kind == "embedded_zeros":
            return self.null_token.new_zeros(batch, frames, len(self.null_token))
        return self.embedder(self.null_token.new_zeros(batch, frames, self.embedder.embedder[0].in_features))

    def forward(self, x: Tensor, t: float | Tensor, context: Tensor) -> Tensor:
        """Prediction [B, 4, h, w] for latents x of that shape.

        Args:
            t: network time in [0, 999], one number or [B]; fractions are taken as they are.
            context: tokens [B, T, W].
        """
        if self.frame_condition is not None:
            x = self.frame_condition(x, context)
        return self.unet(x, times(t, x), context, return_dict=False)[0]


class AlignmentNetwork(nn.Module):
    """Logit that a latent and a video belong together: encoder half of the UNet, mean over space, one linear output.

    Args: as `FoleyUNet`; the defaults are the released ones (11.45 M parameters).
    """

    def __init__(
        self,
        feature_dim: int = 512,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 256),
        layers_per_block: int = 1,
        attention_levels: Sequence[bool] = (False, True, True),
        heads: int = 8,
        context_width: int = 512,
        max_frames: int = 40,
        condition_channels: int = 0,
        columns_per_feature: float | None = None,
        feature_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_levels(block_out_channels, attention_levels, heads)
        first, last, time_width = block_out_channels[0], block_out_channels[-1], 4 * block_out_channels[0]
        self.embedder = ConditionEmbedder(feature_dim, context_width, max_frames, feature_scale)
        self.frame_condition = (
            FrameCondition(context_width, condition_channels, columns_per_feature) if condition_channels else None
        )
        self.time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, time_width)
        self.conv_in = nn.Conv2d(latent_channels + condition_channels, first, 3, padding=1)
        widths = [first, *block_out_channels]
        shared = {"temb_channels": time_width, "resnet_eps": 1e-5, "resnet_act_fn": "silu", "resnet_groups": GROUPS}
        attention = {"cross_attention_dim": context_width, "num_attention_heads": heads}
        unused = {"attention_head_dim": heads}  # by these blocks; diffusers complains if it is not given
        self.down_blocks = nn.ModuleList(
            get_down_block(
                "CrossAttnDownBlock2D" if has_attention else "DownBlock2D",
                num_layers=layers_per_block,
                in_channels=widths[level],
                out_channels=widths[level + 1],
                add_downsample=level < len(block_out_channels) - 1,
                downsample_padding=1,
                **shared,
                **attention,
                **unused,
            )
            for level, has_attention in enumerate(attention_levels)
        )
        self.mid_block = UNetMidBlock2DCrossAttn(in_channels=last, **shared, **attention)
        self.conv_norm_out = nn.GroupNorm(GROUPS, last, eps=1e-5)
        self.conv_out = nn.Conv2d(last, first, 3, padding=1)
        self.classifier = nn.Linear(first, 1)

    def context(self, features: Tensor) -> Tensor:
        """Tokens [B, T, W] of video features [B, T, D]."""
        return self.embedder(features)

    def forward(self, x: Tensor, t: float | Tensor, context: Tensor) -> Tensor:
        """Logits [B] for latents x [B, 4, h, w] at network time t (one number or [B]) and tokens [B, T, W]."""
        embedding = self.time_embedding(self.time_proj(times(t, x)).to(x))
        if self.frame_condition is not None:
            x = self.frame_condition(x, context)
        x = self.conv_in(x)
        for block in self.down_blocks:
            given = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
            x, _ = block(hidden_states=x, temb=embedding, **given)
        x = self.mid_block(x, embedding, encoder_hidden_states=context)
        x = self.conv_out(nn.functional.silu(self.conv_norm_out(x)))
        return self.classifier(x.mean((-2, -1))).squeeze(-1)


def times(t: float | Tensor, x: Tensor) -> Tensor:
    """Network time as float32 [B] for latents x [B, ...]."""
    return torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))


def check_levels(widths: Sequence[int], attention_levels: Sequence[bool], heads: int) -> None:
    """Refuse sizes of a UNet that do not go together.

    Raises:
        UserError: names the setting.
    """
    if len(widths) != len(attention_levels):
        raise UserError(
            f"network.attention_levels: {len(attention_levels)} entries, but block_out_channels has {len(widths)}: "
            "give one for each level"
        )
    if odd := [width for width in widths if width % GROUPS]:
        raise UserError(f"network.block_out_channels: {odd} are no multiples of {GROUPS}, the groups of GroupNorm")
    attended = [width for width, has in zip(widths, attention_levels, strict=True) if has] + [widths[-1]]
    if odd := [width for width in attended if width % heads]:
        raise UserError(f"network.heads: {heads} does not divide {odd}, the width of a level with attention")


def network_settings(given: dict[str, Any] | None, format: ClipFormat, factor: int) -> dict[str, Any]:
    """Arguments of the network; its frame-wise condition learns how many latent columns a feature spans."""
    columns = format.mel_rate / factor / format.fps
    return {"columns_per_feature": columns, **(given or {})}


def check_raw_context(classifier: AlignmentNetwork, unet: FoleyUNet, where: str) -> None:
    """Refuse a classifier whose cross-attention takes no features as they are, for `classifier_context: raw_full`.

    Raises:
        UserError: its context is of another width than the features.
    """
    width, features = classifier.embedder.pos_emb.embedding_dim, unet.embedder.embedder[0].in_features
    if width != features:
        raise UserError(
            f"{where}: guidance.classifier_context: raw_full, shows the classifier features of width {features}, its "
            f"network.context_width is {width}: give embedded_window"
        )
