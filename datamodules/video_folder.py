"""Videos without anything else, to make sound for."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from datamodules.loading import Draw, EvaluationLoader, place
from datamodules.video_files import video_files
from mmtrain import media
from mmtrain.config_errors import UserError
from mmtrain.video_audio import ClipFormat


class VideoFrames(torch.utils.data.Dataset):
    """{"frames": uint8 [T, 3, H, W], "path": str, "fps": float, "seconds": float} of one video, whole."""

    def __init__(self, paths: Sequence[Path], format: ClipFormat, max_seconds: float | None = None) -> None:
        self.paths, self.format, self.max_seconds = list(paths), format, max_seconds

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, draws: list[Draw]) -> dict[str, Any]:
        (draw,) = draws
        path = self.paths[draw.sample]
        frames = media.read_frames(path, self.format.fps, self.format.frame_size, seconds=self.max_seconds)
        return {
            "frames": torch.from_numpy(frames),
            "path": str(path),
            "fps": self.format.fps,
            "seconds": len(frames) / self.format.fps,
            "skipped": {},
        }


class VideoFolderDataModule(pl.LightningDataModule):
    """Videos for `predict`, one a batch, see `VideoFrames`.

    Args:
        videos: a file, a folder (not those below it), or a glob.
        format: frame rate and size that the model was trained with; the paper's if None.
        max_seconds: only so much of each video.
        num_workers: loader processes that decode ahead.

    Raises:
        UserError: no videos. Files that cannot be read are left out and named in `missing`.
    """

    def __init__(
        self, videos: str, format: ClipFormat | None = None, max_seconds: float | None = None, num_workers: int = 0
    ) -> None:
        super().__init__()
        self.videos, self.format, self.max_seconds = videos, format or ClipFormat(), max_seconds
        self.num_workers = num_workers
        self.evaluation_sets: dict[str, dict[str, Any]] = {}
        self.loader_names: list[str] = []
        self.missing: dict[str, str] = {}
        self.data_counts: dict[str, dict[str, int]] = {}
        self.paths: list[Path] = []

    def setup(self, stage: str) -> None:
        if self.paths:
            return
        for path in find_videos(self.videos):
            try:
                media.read_frames(path, self.format.fps, self.format.frame_size, seconds=1 / self.format.fps)
            except UserError as error:
                self.missing[str(path)] = str(error)
                rank_zero_warn(f"left out: {error}")
            else:
                self.paths.append(path)
        if not self.paths:
            raise UserError(f"data.videos: none of the {len(self.missing)} files can be read: {self.missing}")
        self.loader_names = ["videos"]
        self.evaluation_sets = {"videos": {"num_samples": len(self.paths)}}
        self.data_counts = {"videos": {"samples": len(self.paths), "unreadable": len(self.missing)}}
        rank_zero_info(f"videos: {len(self.paths)}, unreadable: {len(self.missing)}")

    def predict_dataloader(self) -> EvaluationLoader:
        dataset = VideoFrames(self.paths, self.format, self.max_seconds)
        return EvaluationLoader(dataset, 1, num_workers=self.num_workers, identity=self.videos, **place(self.trainer))


def find_videos(videos: str) -> list[Path]:
    """Files named by a path, a folder or a glob, by name.

    Raises:
        UserError: there are none.
    """
    path = Path(videos)
    found = video_files(path) if path.is_dir() else [path] if path.is_file() else sorted(map(Path, glob.glob(videos)))
    if not found:
        raise UserError(f"data.videos: {videos}: no video files there")
    return found
