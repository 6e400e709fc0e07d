import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from datamodules.closed_loop import ClosedLoopLoader
from datamodules.episodes import EpisodeStore
from datamodules.loading import TrainLoader
from datamodules.robot import RobotDataModule
from datamodules.robot_windows import WindowDataset
from datamodules.synthetic_episodes import SyntheticDemonstrations
from mmtrain import poses
from mmtrain.checkpoint import flatten
from mmtrain.config_errors import UserError
from mmtrain.normaliser import action_limits, limits

POSE, WRENCH, EMBEDDED = "left_robot_tcp_pose", "left_robot_tcp_wrench", "left_gripper1_marker_offset_emb"


def make(path: Path, task: str, images: bool = False, episodes: int = 4) -> Path:
    source = SyntheticDemonstrations(task, episodes=episodes, images=images)
    RobotDataModule(str(path), task, demonstrations=source).prepare_data()
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    return {task: make(folder / task, task, images=task == "peel") for task in ("peel", "wipe", "lift")}


@pytest.fixture
def wipe(stores, tmp_path) -> Path:
    """A store that a test may spoil."""
    return shutil.copytree(stores["wipe"], tmp_path / "wipe.zarr")


def opened(path: Path, task: str, *names: str, **options) -> RobotDataModule:
    module = RobotDataModule(str(path), task, *names, **({"batch_size": 16} | options))
    module.prepare_data()
    module.setup("fit")
    return module


def frames_of(ends: np.ndarray, episode: int, start: int, horizon: int) -> np.ndarray:
    first, last = ([0, *ends][episode], ends[episode] - 1)
    return np.clip(np.arange(first + start, first + start + horizon), first, last)


@pytest.mark.parametrize(
    ("task", "touch", "vision", "relative"),
    [
        ("wipe", "gelsight", "pose", None),
        ("peel", "normal_force", "pose", None),
        ("lift", "gelsight_mctac", "pose", True),
    ],
)
def test_a_window_holds_the_right_frames_relative_to_now(stores, task, touch, vision, relative):
    module = opened(stores[task], task, touch, "rdp", vision, relative)
    store, spec = EpisodeStore(stores[task]), module.spec
    assert spec.relative and len(module.windows) == store.num_frames  # 3 + 28 = 32 - 1 frames of padding
    numbers = np.array([0, 20, 40, 39, store.num_frames - 1])  # both ends of episodes, too
    batch = module.windows.gather(numbers)
    places = [(0, -3), (0, 17), (1, -3), (0, 36), (3, store.episode_ends[3] - store.episode_ends[2] - 4)]
    frames = np.stack([frames_of(store.episode_ends, episode, start, 32) for episode, start in places])

    action, seen = store.low_dim("action", spec.action_dim), frames[:, [1, 3]]
    tcp = {side: store.low_dim(f"{side}_robot_tcp_pose", 9) for side in spec.arms}
    base = np.concatenate([tcp[side][frames[:, 3], : spec.pose_dim] for side in spec.arms], axis=1)
    np.testing.assert_allclose(poses.absolute_action(batch["action"], base, spec.pose_dim), action[frames], atol=2e-6)
    for key, width in spec.touch_inputs.items():
        stored = store.low_dim(key, 6 if "wrench" in key else 15)[frames]
        np.testing.assert_array_equal(batch["touch"][key], stored[..., 2:3] if width == 1 else stored)
        np.testing.assert_array_equal(batch["observation"][key], batch["touch"][key][:, [1, 3]])
    for side in spec.arms:
        stack = batch["observation"][f"{side}_robot_tcp_pose"]
        identity = [0, 0, 0, 1, 0, 0, 0, 1, 0][: spec.pose_dim]
        np.testing.assert_allclose(stack[:, 1], np.broadcast_to(identity, stack[:, 1].shape), atol=1e-6)
        back = poses.absolute_pose(stack, tcp[side][seen[:, 1], : spec.pose_dim])
        np.testing.assert_allclose(back, tcp[side][seen][..., : spec.pose_dim], atol=2e-6)
    first = tcp[spec.arms[0]][seen[:, 1]].copy()
    first[:, 3:] = first[:, 3:] if spec.pose_dim == 9 else [1, 0, 0, 0, 1, 0]
    expected = poses.relative_pose(store.low_dim("object_pose", 9)[seen], first)
    np.testing.assert_allclose(batch["observation"]["object_pose"], expected, atol=2e-6)


@pytest.mark.parametrize(("lookahead", "ahead"), [("corrected", 2), ("reference", 1)])
def test_diffusion_policy_has_12_frames_a_second_and_its_labels_so_far_ahead(stores, lookahead, ahead):
    module = opened(stores["wipe"], "wipe", "force", "dp", "pose", label_lookahead=lookahead)
    target = EpisodeStore(stores["wipe"]).low_dim("target", 10)
    batch = module.windows.gather(np.array([5]))  # first window that starts behind frame 4 of the low rate
    assert batch["action"].shape == (1, 16, 10) and batch["touch"] == {}
    now = 10 if lookahead == "corrected" else 9  # row 5 of 0, 2, 4, ... or of 0, 1, 3, 5, ...
    np.testing.assert_array_equal(batch["observation"][POSE][0], target[[now - 2, now], :9])
    labels = np.minimum(now - 2 + 2 * np.arange(16) + ahead, 39)
    np.testing.assert_array_equal(batch["action"][0], target[labels])


def test_pictures_are_those_of_the_observed_frames(stores, tmp_path):
    peel = stores["peel"]
    silent = shutil.copytree(peel, tmp_path / "silent.zarr")
    del zarr.open_group(silent, mode="a").attrs["channel_order"]  # as in the released stores
    for path, bgr, is_turned in (
        (peel, False, False),
        (peel, True, False),
        (silent, False, False),
        (silent, True, True),
    ):
        module = opened(path, "peel", "image", "dp", bgr=bgr)
        batch = next(iter(module.train_dataloader()))
        frames = module.windows.frames[module.windows.index[batch["id"]][:, [0, 1]]]
        for place, key in enumerate(("left_gripper1_img", "left_wrist_img")):
            colour = np.stack([frames % 256, frames // 100, np.full_like(frames, 10 * (place + 1))], axis=-1)
            colour = colour[..., ::-1] if is_turned and key == "left_wrist_img" else colour  # tactile pictures never
            pictures = batch["observation"][key]
            assert pictures.dtype == torch.uint8 and pictures.shape == (16, 2, 3, 12, 16)
            np.testing.assert_array_equal(pictures[..., 5, 7], colour)
    assert "left_wrist_img" not in opened(peel, "peel", images=False).windows.gather(np.array([0]))["observation"]


def test_low_dimensional_training_reads_no_picture(tmp_path):
    path = make(tmp_path / "peel", "peel", images=True)
    for chunk in (path / "data/left_wrist_img").glob("*.0.0.0"):
        chunk.write_bytes(b"broken")
    module = opened(path, "peel", "force")
    assert set(module.normaliser_affines()) == {"action", POSE, WRENCH, "left_robot_gripper_width"}
    assert sum(1 for _ in module.training_windows()) == 1
    with pytest.raises(UserError, match=r"left_wrist_img/\d+\.0\.0\.0 is damaged"):
        next(iter(module.train_dataloader()))


def test_normalisers_see_the_training_episodes_only(stores, wipe):
    module = opened(wipe, "wipe", "force", "rdp", "pose")
    affines = module.normaliser_affines()
    windows = module.windows.gather(module.train_windows)
    np.testing.assert_allclose(affines["action"].scale, action_limits(windows["action"]).scale, rtol=1e-6)
    np.testing.assert_allclose(affines[POSE].offset, action_limits(windows["observation"][POSE]).offset, atol=1e-6)
    ends, wrench = module.windows.store.episode_ends, module.windows.store.low_dim(WRENCH, 6)
    validation = np.flatnonzero(module.validation_episodes)
    kept = np.delete(wrench, np.r_[[0, *ends][validation[0]] : ends[validation[0]]], axis=0)
    np.testing.assert_allclose(affines[WRENCH].scale, limits(kept).scale, rtol=1e-6)

    group = zarr.open_group(wipe, mode="a")
    for key in ("action", POSE, WRENCH, "object_pose", "left_robot_gripper_width"):
        for episode in validation:
            group[f"data/{key}"][[0, *ends][episode] : ends[episode]] = 7.0
    again = opened(wipe, "wipe", "force", "rdp", "pose").normaliser_affines()
    for key, affine in affines.items():
        np.testing.assert_array_equal(affine.scale, again[key].scale)
        np.testing.assert_array_equal(affine.stats.mean, again[key].stats.mean)
    quantile = opened(stores["wipe"], "wipe", "force", vision="pose", quantile=0.05).normaliser_affines()
    plain = opened(stores["wipe"], "wipe", "force", vision="pose").normaliser_affines()
    assert (quantile[WRENCH].scale > plain[WRENCH].scale).all()
    np.testing.assert_array_equal(quantile["action"].scale, plain["action"].scale)


def test_batches_do_not_depend_on_processes_and_workers(stores):
    module = opened(stores["peel"], "peel", "force")
    dataset = WindowDataset(module.windows, module.train_windows)
    place = lambda rank, size, workers=0: list(TrainLoader(dataset, 16, 3, rank, size, workers))  # noqa: E731
    alone, forked, halves = place(0, 1), place(0, 1, 2), (place(0, 2), place(1, 2))
    assert len(alone) == len(module.train_windows) // 16
    for batch, other, *parts in zip(alone, forked, *halves, strict=True):
        joined = {key: torch.cat([part[key] for part in parts]) for key in ("action", "id")}
        for key in ("action", "id"):
            assert torch.equal(batch[key], other[key]) and torch.equal(batch[key], joined[key])
        assert torch.equal(batch["observation"]["left_wrist_img"], other["observation"]["left_wrist_img"])
    (loader,) = module.val_dataloader()
    seen = torch.cat([batch["id"] for batch in loader])
    assert seen.tolist() == module.validation_windows.tolist()
    assert not set(seen.tolist()) & set(module.train_windows.tolist())


def test_no_validation_split_means_no_loader(stores):
    module = opened(stores["wipe"], "wipe", val_ratio=0.0, vision="pose")
    assert module.val_dataloader() == [] and module.loader_names == []
    assert module.data_counts == {"train": {"episodes": 4, "frames": 178, "windows": 178}}


@pytest.mark.parametrize(("episodes", "processes"), [(50, 1), (60, 1), (5, 2), (50, 4)])
def test_closed_loop_episodes_are_the_same_for_all_and_never_mixed(episodes, processes):
    loaders = [ClosedLoopLoader(("none", "after"), episodes, 100_000, rank, processes) for rank in range(processes)]
    assert len({len(loader) for loader in loaders}) == 1
    found = set()
    for batch in (batch for loader in loaders for batch in loader):
        assert len(set(batch["variation"])) == 1 and len(batch["seed"]) <= 50
        found |= set(zip(batch["id"].tolist(), batch["variation"], batch["seed"].tolist(), strict=True))
    expected = [(v, 100_000 + i) for v in ("none", "after") for i in range(episodes)]
    assert sorted(found) == [(i, *item) for i, item in enumerate(expected)]


def test_test_runs_closed_loop_with_demonstrations_and_windows_without(wipe):
    source = SyntheticDemonstrations("wipe")
    module = RobotDataModule(str(wipe), "wipe", vision="pose", demonstrations=source, episodes=3)
    module.setup("test")
    (loader,) = module.test_dataloader()
    assert module.loader_names == ["wipe"] and module.evaluation_sets == {"wipe": {"num_samples": 9}}
    assert [batch["variation"][0] for batch in loader] == ["none", "before", "after"]
    assert module.closed_loop_items()[3] == ("before", 100_000) and module.demonstration_mean == 1.0
    for options in ({}, {"demonstrations": source, "episodes": 0}):
        module = RobotDataModule(str(wipe), "wipe", vision="pose", **options)
        module.setup("test")
        assert module.loader_names == ["validation"] and "action" in next(iter(module.test_dataloader()[0]))
    with pytest.raises(UserError, match=r"variations: hard is not one of task wipe"):
        RobotDataModule(str(wipe), "wipe", variations=["hard"])
    with pytest.raises(UserError, match=r"variations: there is none; null takes all of task wipe"):
        RobotDataModule(str(wipe), "wipe", variations=[])


def test_a_store_is_made_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "store"
    with pytest.raises(UserError, match=r"data\.path: .*store does not exist and no data\.demonstrations"):
        RobotDataModule(str(path), "wipe").prepare_data()

    class Interrupted(SyntheticDemonstrations):
        def episodes(self):
            yield next(super().episodes())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RobotDataModule(str(path), "wipe", demonstrations=Interrupted("wipe")).prepare_data()
    assert not path.exists()
    source = SyntheticDemonstrations("wipe")
    module = opened(path, "wipe", demonstrations=source, vision="pose")
    assert module.windows.store.num_episodes == 4 and [p.name for p in path.parent.iterdir()] == ["store"]
    other = SyntheticDemonstrations("wipe", seed=1)
    with pytest.raises(UserError, match=r"'seed': 0.*data.demonstrations says.*'seed': 1.*: delete the store, or give"):
        opened(path, "wipe", demonstrations=other)


def test_of_two_that_make_a_store_at_a_time_the_first_one_s_stays(tmp_path):
    path = tmp_path / "store"

    class Overtaken(SyntheticDemonstrations):
        def episodes(self):
            first, *rest = super().episodes()
            yield first
            RobotDataModule(str(path), "wipe", demonstrations=SyntheticDemonstrations("wipe")).prepare_data()
            yield from rest

    module = opened(path, "wipe", demonstrations=Overtaken("wipe"), vision="pose")
    assert module.windows.store.num_episodes == 4 and [p.name for p in tmp_path.iterdir()] == ["store"]


def spoil(path: Path, name: str, change) -> None:
    group = zarr.open_group(path, mode="a")
    group.create_array(name, data=np.ascontiguousarray(change(group[name][:])), overwrite=True)


BAD_STORES = {
    "another matrix": (
        lambda p: spoil(p, "pca/gelsight/components", lambda c: c[:, ::-1].copy()),
        "episode 0, frame 0",
    ),
    "fewer components": (
        lambda p: spoil(p, "pca/gelsight/components", lambda c: c[:, :10]),
        r"pca/gelsight: components \(126, 10\) .* components \(126, 15\) expected",
    ),
    "another sensor": (lambda p: spoil(p, "pca/gelsight/components", lambda c: c[:50]), r"pca/gelsight: components"),
    "raw field": (
        lambda p: spoil(p, f"data/{EMBEDDED}", lambda e: np.zeros((len(e), 126), np.float32)),
        r"emb has \[126\] numbers a frame, not \[15\]; the released tools store the raw marker field",
    ),
    "nan": (lambda p: spoil(p, f"data/{EMBEDDED}", lambda e: np.where(e == e[50], np.nan, e)), "episode 1, frame 10"),
    "too short": (lambda p: spoil(p, "meta/episode_ends", lambda e: np.r_[31, e]), "episode 0 has 31 frames, a window"),
}


@pytest.mark.parametrize("name", BAD_STORES)
def test_bad_data_get_one_clear_error(wipe, name):
    change, message = BAD_STORES[name]
    change(wipe)
    with pytest.raises(UserError, match=message) as caught:
        opened(wipe, "wipe", "gelsight", vision="pose")
    assert str(wipe) in str(caught.value)


def test_a_store_of_another_task_says_which(stores):
    for task, other, word in (("wipe", "peel", "peel"), ("lift", "wipe", "wipe"), ("peel", "lift", "lift")):
        with pytest.raises(UserError, match=rf"does not fit task {task} .*; its streams are those of task {word}$"):
            opened(stores[other], task, vision="pose")
    with pytest.raises(UserError, match=r"data/left_wrist_img is missing; it has object_pose, for vision: pose$"):
        opened(stores["wipe"], "wipe")


def test_a_config_makes_it_and_its_settings_are_plain():
    parser = ArgumentParser(parser_mode="omegaconf+", exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    source = {"class_path": "datamodules.synthetic_episodes.SyntheticDemonstrations", "init_args": {"task": "peel"}}
    arguments = {"path": "nowhere", "task": "peel", "touch": "force", "demonstrations": source}
    config = {"data": {"class_path": "datamodules.robot.RobotDataModule", "init_args": arguments}}
    module = parser.instantiate_classes(parser.parse_object(config)).data
    settings = flatten(dict(module.hparams))
    assert settings["demonstrations.made_by"] == "synthetic" and settings["demonstrations.size"] == [12, 16]
    assert all(type(value) in (str, int, float, bool, list, type(None)) for value in settings.values())
    direct = RobotDataModule("nowhere", "peel", "force", demonstrations=SyntheticDemonstrations("peel"))
    assert flatten(dict(direct.hparams)) == settings
