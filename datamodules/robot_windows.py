"""Windows of robot episodes, gathered for a whole batch at a time, and the statistics to normalise them by."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from datamodules.episodes import (
    EpisodeStore,
    LabelLookahead,
    check_embedding,
    downsample,
    missing_streams,
    window_indices,
    window_starts,
)
from datamodules.loading import Draw
from mmtrain import poses
from mmtrain.config_errors import UserError
from mmtrain.normaliser import Affine, action_limits, limits
from mmtrain.robot_observations import base_pose, cut, relative_observation, stored_width
from mmtrain.robot_tasks import ARMS, OBJECT_POSE, PolicySpec, policy_spec

STATISTICS_CHUNK = 4096  # windows at a time
CHECKED_FRAMES = 8  # whose embedding is computed anew, and must be the stored one


class RobotWindows:
    """All windows of a store as a policy sees them (specification 1.6, 1.8), low-dimensional streams in memory.

    Args:
        label_lookahead: of `datamodules.episodes.downsample`; matters at 12 frames a second only.
        images: read pictures; False leaves them out of the batches.
        bgr: cameras of a store that does not say its order are blue first: `EpisodeStore.is_blue_first`.
        quantile: of the limits of touch and widths, see `mmtrain.normaliser.limits`.

    Attributes:
        index: [W, H], row of `action` and of `streams` of each frame of each window.
        episode: [W], episode of each window.

    Raises:
        UserError: streams missing or not of the layout (if another task would fit, it is named), an episode shorter
            than a window, numbers that are not finite, embeddings that are not those of the store's own PCA.
    """

    def __init__(
        self,
        store: EpisodeStore,
        spec: PolicySpec,
        label_lookahead: LabelLookahead = "corrected",
        images: bool = True,
        bgr: bool = False,
        quantile: float | None = None,
    ) -> None:
        self.store, self.spec, self.quantile = store, spec, quantile
        widths = spec.low_dim | spec.touch_inputs
        check_streams(store, spec, images)
        store.check_lengths(spec.horizon * spec.frames_per_step)
        self.frames, labels, ends = downsample(store.episode_ends, spec.frames_per_step, label_lookahead)
        self.action = store.low_dim("action", spec.action_dim)[labels]
        self.streams = {
            key: np.ascontiguousarray(cut(key, store.low_dim(key, stored_width(key)), width)[self.frames])
            for key, width in widths.items()
        }
        for key in widths:
            if key.endswith("_marker_offset_emb"):
                check_embedding(store, key, CHECKED_FRAMES)
        self.pictures = {key: store.pictures(key, bgr) for key in (spec.images if images else ())}
        geometry = (ends, spec.horizon, spec.pad_before, spec.pad_after)
        self.index = window_indices(*geometry)
        self.episode = window_starts(*geometry)[2]
        self._ends = ends

    def __len__(self) -> int:
        return len(self.index)

    def gather(self, windows: np.ndarray, pictures: bool = True) -> dict[str, Any]:
        """The windows [B] as `{"action": [B, H, A], "observation": {key: [B, 2, ...]}, "touch": {key: [B, H, D]}}`.

        Raw physical units, float32; pictures uint8 [B, 2, 3, H, W] RGB. Poses are relative if the policy's are.
        """
        spec = self.spec
        index = self.index[windows]
        seen = index[:, spec.observation_frames]
        action = self.action.take(index, axis=0)
        stack = {key: self.streams[key].take(seen, axis=0) for key in spec.low_dim}
        if spec.relative:
            action = poses.relative_action(action, base_pose(spec, stack), spec.pose_dim)
            stack = relative_observation(spec, stack)
        observation = {key: np.asarray(values, dtype=np.float32) for key, values in stack.items()}
        if pictures:
            observation |= {key: array.read(self.frames[seen]) for key, array in self.pictures.items()}
        return {
            "action": np.asarray(action, dtype=np.float32),
            "observation": observation,
            "touch": {key: self.streams[key].take(index, axis=0) for key in spec.touch_inputs},
        }

    def of_episodes(self, mask: np.ndarray) -> np.ndarray:
        """Numbers of the windows of the episodes in a mask [E]."""
        return np.flatnonzero(mask[self.episode])

    def affines(self, train: np.ndarray) -> dict[str, Affine]:
        """Normalisers (specification 1.7) of "action" and every stream, fitted on the episodes in the mask [E] only.

        Absolute poses and all other streams: over the frames. Relative ones: over all windows, padding included, all
        frames of the action and both of the observation.
        """
        rows = np.flatnonzero(np.repeat(train, np.diff(self._ends, prepend=0)))
        data = {key: values[rows] for key, values in self.streams.items()} | {"action": self.action[rows]}
        if self.spec.relative:
            data |= self._relative_data(self.of_episodes(train))
        return {key: self._affine(key, values) for key, values in data.items()}

    def _affine(self, key: str, values: np.ndarray) -> Affine:
        if key == "action" or key.endswith("_robot_tcp_pose"):
            return action_limits(values)
        return limits(values, quantile=None if key == OBJECT_POSE else self.quantile)

    def _relative_data(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        keys = [key for key in self.spec.low_dim if key.endswith("_robot_tcp_pose") or key == OBJECT_POSE]
        parts: dict[str, list[np.ndarray]] = {key: [] for key in ("action", *keys)}
        for start in range(0, len(windows), STATISTICS_CHUNK):
            batch = self.gather(windows[start : start + STATISTICS_CHUNK], pictures=False)
            parts["action"].append(batch["action"])
            for key in keys:
                parts[key].append(batch["observation"][key])
        return {key: np.concatenate(own).reshape(-1, own[0].shape[-1]) for key, own in parts.items()}


class WindowDataset(torch.utils.data.Dataset):
    """Turns draws into batches of windows, with their numbers in the store as "id"."""

    def __init__(self, windows: RobotWindows, chosen: np.ndarray, pictures: bool = True) -> None:
        self.windows, self.chosen, self.pictures = windows, chosen, pictures

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, draws: list[Draw]) -> dict[str, Any]:
        numbers = self.chosen[[draw.sample for draw in draws]]
        return tensors(self.windows.gather(numbers, self.pictures)) | {"id": torch.from_numpy(numbers), "skipped": {}}

    def batches(self, size: int) -> Iterator[dict[str, Any]]:
        """All windows once, in order."""
        for start in range(0, len(self), size):
            numbers = self.chosen[start : start + size]
            yield tensors(self.windows.gather(numbers, self.pictures)) | {"id": torch.from_numpy(numbers)}


def tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """Arrays of a nested dict as tensors on the same memory."""
    return {key: tensors(v) if isinstance(v, dict) else torch.from_numpy(v) for key, v in batch.items()}


def check_streams(store: EpisodeStore, spec: PolicySpec, images: bool) -> None:
    """All streams of a policy must be there at the width of the layout.

    Raises:
        UserError: naming what is missing, and the tasks that the store does fit.
    """
    lacking = missing_streams(store, *_needed(spec, images))
    if not lacking:
        return
    tasks = [task for task in ARMS if task != spec.task and not missing_streams(store, *_base_streams(task))]
    hint = f"; its streams are those of task {' or '.join(tasks)}" if tasks else ""
    if any("_marker_offset_emb has" in line for line in lacking):
        hint += "; the released tools store the raw marker field where their PCA does not fit: `data convert` mends it"
    elif not tasks and spec.vision == "pose" and OBJECT_POSE not in store.keys:
        hint = f"; vision: pose needs a simulated store, which has {OBJECT_POSE}"
    elif not tasks and spec.vision == "camera" and OBJECT_POSE in store.keys:
        hint = f"; it has {OBJECT_POSE}, for vision: pose"
    raise UserError(
        f"{store.path} does not fit task {spec.task} with touch {spec.touch} and vision {spec.vision}: "
        f"{', '.join(lacking)}{hint}"
    )


def _needed(spec: PolicySpec, images: bool) -> tuple[dict[str, int], tuple[str, ...]]:
    widths = {key: stored_width(key) for key in spec.low_dim | spec.touch_inputs}
    return {"action": spec.action_dim} | widths, spec.images if images else ()


def _base_streams(task: str) -> tuple[dict[str, int], tuple[str, ...]]:
    return _needed(policy_spec(task, "none", "dp"), images=False)
