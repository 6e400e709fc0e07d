"""The contrastive objectives of CAVP (Diff-Foley, arXiv 2306.17203) as pure tensor functions.

Shapes: N clips of this process, V videos with c clips each (N = V * c, clips of one video adjacent), T frames,
D feature width. Features are unit rows; `scale` is exp(logit_scale).

Every process computes the loss of its own rows against the columns of all, and gathering passes gradients on: averaged
over processes, as DDP does, value and gradient are those of one process with the whole batch. The released code gathers
without gradient, so that its feature gradients are 1 / processes of the exact ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain import distributed


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        return distributed.gather_rows(local)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return distributed.sum_and_keep_own_rows(gradient.contiguous())


def gather(local: Tensor) -> Tensor:
    """Rows [N, D] of all processes in rank order, with gradient; every process brings the same N."""
    return local if distributed.world_size() == 1 else _Gather.apply(local)


def semantic_contrast(video: Tensor, audio: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over all clips: 1/2 [CE(s v a^T, i) + CE(s a v^T, i)], the "extra" term.

    Args:
        video: unit rows [N, D].
        audio: unit rows [N, D]; row i belongs to row i of `video`.
        scale: s, exponentiated.
    """
    index = torch.arange(len(video), device=video.device) + distributed.rank() * len(video)
    to_audio = F.cross_entropy(scale * video @ gather(audio).T, index)
    to_video = F.cross_entropy(scale * audio @ gather(video).T, index)
    return (to_audio + to_video) / 2


def temporal_contrast(video: Tensor, audio: Tensor, scale: Tensor, clips_per_video: int) -> Tensor:
    """Symmetric InfoNCE whose only negatives are the other clips of the same video, the "intra" term.

    Args:
        video: unit rows [V * c, D], clips of a video adjacent.
        audio: unit rows [V * c, D].
        scale: s, exponentiated.
        clips_per_video: c.

    Raises:
        ValueError: the rows are no multiple of `clips_per_video`.
    """
    return symmetric_blocks(scale * video_blocks(video, clips_per_video) @ video_blocks(audio, clips_per_video).mT)


def cavp_loss(
    video: Tensor, audio: Tensor, scale: Tensor, clips_per_video: int = 3, intra_weight: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the paper: semantic contrast + intra_weight * temporal contrast.

    Args:
        video: unit rows [V * c, D], clips of a video adjacent.
        audio: unit rows [V * c, D].
        scale: s, exponentiated.
        clips_per_video: c; with 1 there is no temporal contrast.
        intra_weight: weight of the temporal term; 0 leaves it out.

    Returns:
        the loss and its parts `semantic` and `temporal`, detached.
    """
    semantic = semantic_contrast(video, audio, scale)
    if clips_per_video == 1:
        return semantic, {"semantic": semantic.detach()}
    temporal = temporal_contrast(video, audio, scale, clips_per_video)
    parts = {"semantic": semantic.detach(), "temporal": temporal.detach()}
    return (semantic + intra_weight * temporal if intra_weight else semantic), parts


def temporal_semantic_loss(
    video_frames: Tensor, audio_frames: Tensor, video: Tensor, audio: Tensor, scale: Tensor, temporal_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Variant in the released code, unused in the release: w * InfoNCE over the frames of a clip + InfoNCE over clips.

    Args:
        video_frames: unit rows [N, T, D], one clip a video.
        audio_frames: unit rows [N, T, D].
        video: pooled unit rows [N, D].
        audio: pooled unit rows [N, D].
        scale: s, exponentiated.
        temporal_weight: w.

    Returns:
        the loss and its parts `semantic` and `temporal`, detached.
    """
    semantic = semantic_contrast(video, audio, scale)
    temporal = symmetric_blocks(scale * video_frames @ audio_frames.mT)
    parts = {"semantic": semantic.detach(), "temporal": temporal.detach()}
    return temporal_weight * temporal + semantic, parts


def mean_pool_loss(
    video: Tensor,
    audio: Tensor,
    video_mean: Tensor,
    audio_mean: Tensor,
    scale: Tensor,
    clips_per_video: int = 3,
    intra_weight: float = 1.0,
    audio_side: str = "correct",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Variant in the released code, unused in the release: temporal contrast of mean-pooled features.

    Args:
        video: max-pooled unit rows [V * c, D] for the semantic term.
        audio: max-pooled unit rows [V * c, D].
        video_mean: mean-pooled unit rows [V * c, D] for the temporal term.
        audio_mean: mean-pooled unit rows [V * c, D].
        scale: s, exponentiated.
        clips_per_video: c.
        intra_weight: weight of the temporal term.
        audio_side: "correct", or "released_fault": the released code takes the video's logits for the sound's too, so
            that half of the term is counted twice and the other half is missing. For comparison only.

    Returns:
        the loss and its parts `semantic` and `temporal`, detached.

    Raises:
        ValueError: another `audio_side`, or rows that are no multiple of `clips_per_video`.
    """
    if audio_side not in ("correct", "released_fault"):
        raise ValueError(f"audio_side must be 'correct' or 'released_fault', got {audio_side!r}")
    semantic = semantic_contrast(video, audio, scale)
    logits = scale * video_blocks(video_mean, clips_per_video) @ video_blocks(audio_mean, clips_per_video).mT
    temporal = symmetric_blocks(logits) if audio_side == "correct" else block_cross_entropy(logits)
    parts = {"semantic": semantic.detach(), "temporal": temporal.detach()}
    return semantic + intra_weight * temporal, parts


def video_blocks(rows: Tensor, clips_per_video: int) -> Tensor:
    """[V * c, D] to [V, c, D].

    Raises:
        ValueError: the rows are no multiple of c.
    """
    if len(rows) % clips_per_video:
        raise ValueError(f"{len(rows)} rows are no multiple of clips_per_video {clips_per_video}")
    return rows.unflatten(0, (-1, clips_per_video))


def block_cross_entropy(logits: Tensor) -> Tensor:
    """Mean cross-entropy of the rows of [V, c, c], whose right answers stand on the diagonals."""
    index = torch.arange(logits.shape[-1], device=logits.device).repeat(len(logits))
    return F.cross_entropy(logits.flatten(0, 1), index)


def symmetric_blocks(logits: Tensor) -> Tensor:
    """Mean of `block_cross_entropy` over rows and over columns."""
    return (block_cross_entropy(logits) + block_cross_entropy(logits.mT)) / 2
