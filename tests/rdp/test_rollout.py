"""Closed loop: episodes repeat, do not depend on their neighbours, are kept, and a better policy than chance scores."""

import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

pytest.importorskip("mujoco")

from datamodules.robot import RobotDataModule
from mmtrain.config_errors import UserError
from mmtrain.normaliser import Affine, statistics
from mmtrain.rdp import sim
from mmtrain.rdp.dp import DiffusionPolicy
from mmtrain.rdp.module import LatentDiffusionPolicy, PolicyModule
from mmtrain.rdp.planning import plans, prepare, start_noise
from mmtrain.rdp.rollout import RolloutSettings, run_episodes
from mmtrain.rdp.runtime import RuntimeSettings
from mmtrain.rdp.sim.demonstrations import Demonstrations


def centred(policy: PolicyModule, frame: dict[str, np.ndarray]) -> PolicyModule:
    """A policy whose actions stay within 1 cm and 0.1 of where the arms begin: untrained, but a robot can follow it."""
    for key, width in {"action": policy.spec.action_dim, **policy.spec.low_dim}.items():
        offset = np.zeros(width, np.float32)
        if key == "action" and not policy.spec.relative:
            poses = [frame[f"{side}_robot_tcp_pose"][: policy.spec.pose_dim] for side in policy.spec.arms]
            offset = -100 * np.concatenate([*poses, np.zeros(len(policy.spec.arms))]).astype(np.float32)
        affine = Affine(np.full(width, 100, np.float32), offset, statistics(np.zeros((2, width))))
        for normaliser in (policy.normalizer, getattr(getattr(policy, "tokenizer", None), "normalizer", None)):
            if normaliser is not None and key in normaliser.widths:
                normaliser.set(key, affine)
    if "latent" in policy.normalizer.widths:
        width = policy.normalizer.widths["latent"]
        one, zero = np.ones(width, np.float32), np.zeros(width, np.float32)
        policy.normalizer.set("latent", Affine(one, zero, statistics(np.zeros((2, width)))))
    return policy.eval()


@pytest.fixture(scope="module")
def policies() -> dict[str, PolicyModule]:
    torch.manual_seed(0)
    frame, _ = sim.make("wipe").reset(seed=0, options={"variation": "none"})
    return {
        "rdp": centred(LatentDiffusionPolicy("wipe", "force", "pose", preset="sim"), frame),
        "dp": centred(DiffusionPolicy("wipe", "gelsight", "pose", preset="sim"), frame),
    }


@pytest.mark.parametrize("method", ["rdp", "dp"])
def test_an_episode_depends_on_its_seed_alone(policies, method: str) -> None:
    both = run_episodes(policies[method], RuntimeSettings(), "after", [100_000, 100_001])
    alone = run_episodes(policies[method], RuntimeSettings(), "after", [100_001])
    assert [record["seed"] for record in both] == [100_000, 100_001]
    assert {key: type(value) for key, value in both[1].items()} == {key: type(value) for key, value in alone[0].items()}
    assert both[1]["frames"] == alone[0]["frames"]
    np.testing.assert_allclose(both[1]["force"], alone[0]["force"], atol=0.05)  # rounding of a batch of another size
    assert both[0]["counts"]["missing_touch"] == both[0]["counts"]["rejected_plans"] == 0
    json.dumps(both)


def test_start_noise_is_each_episodes_own() -> None:
    both, alone = start_noise([(3, 0), (4, 16)], (8, 6)), start_noise([(4, 16)], (8, 6))
    assert torch.equal(both[1], alone[0]) and not torch.equal(both[0], both[1])


def test_the_policy_sees_relative_poses_and_keeps_the_base(policies) -> None:
    env = sim.make("wipe")
    frame, _ = env.reset(seed=3, options={"variation": "none"})
    moved = {**frame, "left_robot_tcp_pose": frame["left_robot_tcp_pose"] + np.float32([0.01, *np.zeros(8)])}
    stack = {key: np.stack([frame[key], moved[key]]) for key in frame}
    ready, base = prepare(stack, policies["rdp"].spec)
    np.testing.assert_allclose(base, moved["left_robot_tcp_pose"], atol=1e-7)
    np.testing.assert_allclose(ready["left_robot_tcp_pose"][1], [0, 0, 0, 1, 0, 0, 0, 1, 0], atol=1e-6)
    assert np.linalg.norm(ready["left_robot_tcp_pose"][0][:3]) == pytest.approx(0.01, abs=1e-6)
    ready, _ = prepare(stack, policies["dp"].spec)
    np.testing.assert_allclose(ready["left_robot_tcp_pose"], stack["left_robot_tcp_pose"], atol=1e-7)
    plan = plans(policies["rdp"], [stack], [7], [0])[0]
    assert (plan.made, plan.period, plan.num_rows, plan.first_prefix, plan.rows.shape) == (7, 1, 29, 4, (64,))
    plan = plans(policies["dp"], [stack], [7], [0])[0]
    assert (plan.period, plan.num_rows, plan.rows.shape) == (2, 15, (15, 10))


def test_nothing_is_sent_before_the_latency_is_over(policies) -> None:
    """The arm stays where it is until the first plan can be there, and no longer."""
    moved = []

    def note(env, info) -> None:
        moved.append(env.unwrapped.last_action.copy())

    run_episodes(policies["rdp"], RuntimeSettings(latency=6), "none", [100_000], note)
    still = [np.allclose(action[:3], moved[0][:3], atol=1e-3) for action in moved[:8]]
    assert all(still[:6]) and not still[7]


def make_trainer(folder: Path) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder, logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False
    )


def test_test_writes_records_and_does_not_run_them_again(policies, tmp_path, monkeypatch) -> None:
    policy = policies["rdp"]
    policy.rollout = RolloutSettings(videos=False, latency=False)
    demonstrations = Demonstrations("wipe", episodes=2)
    data = RobotDataModule(
        str(tmp_path / "wipe.zarr"),
        "wipe",
        "force",
        vision="pose",
        val_ratio=0,
        demonstrations=demonstrations,
        episodes=2,
    )
    first = make_trainer(tmp_path).test(policy, data, verbose=False)[0]
    records = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [(r["variation"], r["seed"] - 100_000) for r in records] == [
        (variation, seed) for variation in ("none", "before", "after") for seed in (0, 1)
    ]
    assert {"test/wipe/no_perturb", "test/wipe/perturb_after_contact_low", "test/wipe/all"} <= first.keys()
    assert (tmp_path / "figures/force-after.png").exists()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("was run again")

    monkeypatch.setattr("mmtrain.rdp.rollout.run_episodes", refuse)
    again = make_trainer(tmp_path).test(policy, data, verbose=False)[0]
    np.testing.assert_equal(again, first)  # NaN where nothing was touched
    part = tmp_path / "rollouts/part-0.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    part.write_text(lines[0][:50] + "\n" + "".join(lines))  # killed while it wrote, and gone on
    make_trainer(tmp_path).test(policy, data, verbose=False)
    with torch.no_grad():
        policy.model.final_conv[1].bias += 1e-3  # other weights
    with pytest.raises(AssertionError, match="was run again"):
        make_trainer(tmp_path).test(policy, data, verbose=False)


def test_a_policy_that_was_never_trained_is_not_tested(tmp_path) -> None:
    data = RobotDataModule(
        str(tmp_path / "wipe.zarr"), "wipe", "force", vision="pose", val_ratio=0,
        demonstrations=Demonstrations("wipe", episodes=1), episodes=1, variations=["none"],
    )  # fmt: skip
    with pytest.raises(UserError, match="normaliser of action is not fitted: train first, or load a checkpoint"):
        make_trainer(tmp_path).test(LatentDiffusionPolicy("wipe", "force", "pose", preset="sim"), data)


def test_training_needs_no_simulator() -> None:
    hide = "import sys; sys.modules['mujoco'] = sys.modules['gymnasium'] = None; "
    code = hide + "import mmtrain.rdp.module, mmtrain.rdp.dp, mmtrain.rdp.tokenizer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_videos_are_written_where_there_is_egl(policies, tmp_path) -> None:
    av = pytest.importorskip("av")
    try:
        sim.make("wipe", render_mode="rgb_array").reset(seed=0, options={"variation": "none"})
    except Exception as error:
        pytest.skip(f"no EGL: {error}")
    policy = policies["rdp"]
    policy.rollout = RolloutSettings(latency=False)
    data = RobotDataModule(
        str(tmp_path / "wipe.zarr"), "wipe", "force", vision="pose", val_ratio=0,
        demonstrations=Demonstrations("wipe", episodes=1), episodes=1, variations=["none"],
    )  # fmt: skip
    make_trainer(tmp_path).test(policy, data, verbose=False)
    with av.open(tmp_path / "figures/rollout-none.mp4") as video:
        assert sum(1 for _ in video.decode(video=0)) > 10
    assert [figure["kind"] for figure in policy.figures].count("video") == 1
