"""Features of whole videos by a trained CAVP, which the later stages take as their condition (Diff-Foley)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtrain.checkpoint import settings
from mmtrain.config_errors import UserError
from mmtrain.difffoley.cavp import CavpNetwork
from mmtrain.difffoley.pretrained_cavp import cavp_sizes, fit, read_cavp
from mmtrain.difffoley.slowonly import RECEPTIVE_FRAMES
from mmtrain.feature_cache import fingerprint
from mmtrain.video_audio import ClipFormat


def load_cavp(path: str, where: str = "cavp") -> tuple[CavpNetwork, ClipFormat]:
    """A trained CAVP, ours or the released file, frozen and in evaluation mode, and how its clips were cut.

    The sizes are read from the weights. A released file does not tell its format; it is the paper's.

    Args:
        path: the checkpoint.
        where: the setting that named the file, for messages.

    Raises:
        UserError: no such file, not readable, or no CAVP.
    """
    state, hyper_parameters = read_cavp(path, where)
    with torch.random.fork_rng(devices=[]):  # the fresh weights that are replaced must not move the caller's numbers
        network = CavpNetwork(**vars(cavp_sizes(state, path)))
    fit(network, state, path, where)
    return network.requires_grad_(False).eval(), settings(ClipFormat, hyper_parameters.get("format"))


class CavpFeatures:
    """Turns the frames of a video into one unit feature a frame.

    A feature sees 9 frames on either side, so a long video is encoded in groups of frames that overlap, and of each
    group only the centre is kept. With an overlap of 9 or more the features are those of one pass over the whole
    video, at the memory of one group.

    Args:
        checkpoint: a trained CAVP, ours or the released file.
        group_frames: frames of a group; 40, which is 10 s, in the release.
        overlap: frames on either side of a group that are computed and thrown away. 0 is what was released: groups
            one after another, with a seam every 10 s where temporal convolutions see zeros.
        batch_size: groups encoded at a time.
        format: how the data's clips are cut; None takes the checkpoint's word.
        device: None takes the first GPU, or the CPU without one.

    Raises:
        UserError: no such checkpoint, or one of other frames a second or another frame size than `format`'s.
    """

    def __init__(
        self,
        checkpoint: str,
        group_frames: int = 40,
        overlap: int = RECEPTIVE_FRAMES,
        batch_size: int = 8,
        format: ClipFormat | None = None,
        device: str | None = None,
    ) -> None:
        if overlap < 0 or group_frames <= 2 * overlap or batch_size < 1:
            raise UserError(
                f"group_frames: {group_frames}, overlap: {overlap}, batch_size: {batch_size}: a group must be longer "
                "than the overlap on both its sides, and batch_size at least 1"
            )
        self.checkpoint, self.batch_size = str(checkpoint), batch_size
        self.group_frames, self.overlap = group_frames, overlap
        self.network, self.format = load_cavp(checkpoint, "checkpoint")
        if format is not None:
            self.check(settings(ClipFormat, format))
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.sha = fingerprint(self.network)
        self.network.to(self.device)

    @property
    def width(self) -> int:
        """D, width of a feature."""
        return self.network.feature_dim

    def check(self, format: ClipFormat) -> None:
        """Refuse clips of other frames a second or another frame size than the checkpoint was trained on.

        Raises:
            UserError: names the checkpoint and the setting.
        """
        for name in ("fps", "frame_size"):
            theirs, ours = getattr(self.format, name), getattr(format, name)
            if theirs != ours:
                raise UserError(
                    f"checkpoint: {self.checkpoint}: was trained with format.{name} {theirs}, the data have {ours}: "
                    "give both the same"
                )

    def describe(self) -> dict[str, Any]:
        """What the features depend on, as plain values: stored beside them, and compared before they are used."""
        return {
            "extractor": f"{type(self).__module__}.{type(self).__qualname__}",
            "sha": self.sha,
            "fps": self.format.fps,
            "frame_size": self.format.frame_size,
            "width": self.width,
            "group_frames": self.group_frames,
            "overlap": self.overlap,
        }

    @torch.no_grad()
    def extract(self, frames: np.ndarray | Tensor) -> Tensor:
        """Features of one video or, at once, of several of one length.

        Args:
            frames: uint8 [T, 3, H, W] or [N, T, 3, H, W], at the checkpoint's frames a second.

        Returns:
            float32 [T, D] or [N, T, D] on the CPU, unit length.

        Raises:
            UserError: frames of another size than the checkpoint's, none at all, or features that are not finite.
        """
        frames = torch.as_tensor(frames)
        if frames.ndim == 4:
            return self.extract(frames[None])[0]
        size = self.format.frame_size
        if frames.dtype != torch.uint8 or tuple(frames.shape[2:]) != (3, size, size):
            raise UserError(
                f"checkpoint: {self.checkpoint}: takes uint8 frames [T, 3, {size}, {size}] (format.frame_size {size}), "
                f"got {frames.dtype} {list(frames.shape[1:])}"
            )
        if not frames.shape[1]:
            raise UserError(f"checkpoint: {self.checkpoint}: was given a video without frames")
        groups = frame_groups(frames.shape[1], self.group_frames, self.overlap)
        pieces = [(row, *group) for row in range(len(frames)) for group in groups]
        out = torch.empty(*frames.shape[:2], self.width)
        for length in {end - start for _, start, end, _, _ in pieces}:
            alike = [piece for piece in pieces if piece[2] - piece[1] == length]
            for index in range(0, len(alike), self.batch_size):
                block = alike[index : index + self.batch_size]
                video = torch.stack([frames[row, start:end] for row, start, end, _, _ in block]).to(self.device)
                features = self.network.encode_video(video.float() / 255).cpu()
                for feature, (row, start, _, first, last) in zip(features, block, strict=True):
                    out[row, first:last] = feature[first - start : last - start]
        if not out.isfinite().all():
            raise UserError(f"checkpoint: {self.checkpoint}: gives features with NaN or infinity: check its weights")
        return out


def frame_groups(frames: int, group_frames: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """How a video is cut into groups of frames of which the centres cover it once.

    Args:
        frames: length of the video.
        group_frames: longest group.
        overlap: least number of frames that a group has before its first and after its last kept one, but at the
            video's ends. 0: groups one after another, the last shorter.

    Returns:
        (first encoded, end of encoded, first kept, end of kept) of each group.

    Example:
        >>> frame_groups(100, 40, 9)
        [(0, 40, 0, 31), (22, 62, 31, 53), (44, 84, 53, 75), (60, 100, 75, 100)]
    """
    if frames <= group_frames:
        return [(0, frames, 0, frames)]
    if overlap == 0:
        starts = range(0, frames, group_frames)
        return [(start, end, start, end) for start in starts for end in [min(start + group_frames, frames)]]
    found, kept = [], 0
    while kept < frames:
        start = min(max(0, kept - overlap), frames - group_frames)  # the last group is moved back to its full length
        end = start + group_frames
        last = frames if end == frames else end - overlap
        found.append((start, end, kept, last))
        kept = last
    return found
