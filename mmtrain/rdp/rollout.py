"""Closed-loop runs in simulation: many episodes in lock-step, so that the slow policy plans for all at once.

The world never waits for the policy: a plan made from the observation of frame S can be used from frame S + latency on.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from mmtrain import distributed
from mmtrain.checkpoint import settings
from mmtrain.config_errors import UserError
from mmtrain.feature_cache import fingerprint
from mmtrain.rdp.evaluate import RolloutEvaluation
from mmtrain.rdp.fast_step import NumpyDecoder
from mmtrain.rdp.figures import write_video
from mmtrain.rdp.latency import measure_latency
from mmtrain.rdp.planning import plans
from mmtrain.rdp.records import FILE
from mmtrain.rdp.runtime import Controller, RuntimeSettings
from mmtrain.rdp.sim.demonstrations import WORLD
from mmtrain.robot_tasks import sensor_of

if TYPE_CHECKING:
    import gymnasium  # of the extra `sim`, which training needs not

    from mmtrain.rdp.module import PolicyModule

MAX_FRAMES = 240  # of an episode, 10 s, the same for all methods
FrameHook = Callable[["gymnasium.Env", dict[str, Any]], None]


@dataclass
class RolloutSettings:
    """How `test` runs a policy in simulation.

    Args:
        runtime: latency, chunks, ensembling, missing touch.
        videos: write a video of one episode a cell; needs EGL.
        latency: measure how long the slow and the fast step take.
    """

    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    videos: bool = True
    latency: bool = True

    def __post_init__(self) -> None:
        self.runtime = settings(RuntimeSettings, self.runtime)

    @property
    def suffix(self) -> str:
        """What the paper's Table V adds to a row's name for other chunks and ensembling."""
        runtime = self.runtime
        if runtime.ensembling == "hato":
            return f", ensembling tau {runtime.tau:g}"
        if runtime.ensembling != "newest":
            return f", ensembling {runtime.ensembling}"
        return "" if runtime.chunk_every == 16 else f", chunk {runtime.chunk_every // 2}"


def make_environment(module: "PolicyModule", render: bool = False) -> "gymnasium.Env":
    """The world of a policy's task, with the sensors that the policy reads and no others, as they cost time."""
    from mmtrain.rdp import sim

    images = module.spec.images
    markers = {sensor for key in (*module.spec.low_dim, *images) if (sensor := sensor_of(key))}
    options: dict[str, Any] = {"markers": tuple(sorted(markers))}
    if images:
        options |= {"images": images, "size": module.obs_encoder.images[images[0]][0]}
    if render:
        options["render_mode"] = "rgb_array"
    return sim.make(module.spec.task, **options)


def run_episodes(
    module: "PolicyModule",
    runtime: RuntimeSettings,
    variation: str,
    seeds: Sequence[int],
    on_frame: FrameHook | None = None,
    render: bool = False,
) -> list[dict[str, Any]]:
    """Run one episode a seed, all in lock-step; returns their records.

    Args:
        on_frame: called with every environment and its info after each frame.
        render: make environments that can be rendered.

    Returns:
        what the environment says of the outcome, with `variation`, `seed`, `counts` (missing touch, late plans, held
        commands), `force`, the true (largest) normal force of every frame in newtons, and `force_band`, what is stable.
    """
    spec = module.spec
    environments = [make_environment(module, render) for _ in seeds]
    tokenizer = getattr(module, "tokenizer", None)
    decoder = None if tokenizer is None else NumpyDecoder.from_state(tokenizer.state_dict())
    controllers = [Controller(runtime, decoder, spec) for _ in seeds]
    frames = [
        environment.reset(seed=seed, options={"variation": variation})[0]
        for environment, seed in zip(environments, seeds, strict=True)
    ]
    forces: list[list[float]] = [[] for _ in seeds]
    live, step = list(range(len(seeds))), 0
    while live:
        for i in live:
            controllers[i].observe(frames[i], step)
        planning = [i for i in live if controllers[i].wants_plan(step)]
        if planning:
            observations = [controllers[i].observation() for i in planning]
            made = plans(module, observations, [step] * len(planning), [seeds[i] for i in planning])
            for i, plan in zip(planning, made, strict=True):
                controllers[i].accept(plan, step + runtime.latency)
        ended = []
        for i in live:
            command = controllers[i].command(step)
            if command is None:  # no plan yet: stay
                command = present_pose(frames[i], spec)
            frames[i], _, terminated, truncated, info = environments[i].step(command)
            forces[i].append(round(float(np.max(info["force"])), 2))
            if on_frame is not None:
                on_frame(environments[i], info)
            if terminated or truncated:
                ended.append(i)
        live = [i for i in live if i not in ended]
        step += 1
    records = []
    for environment, controller, seed, force in zip(environments, controllers, seeds, forces, strict=True):
        about = {"variation": variation, "seed": int(seed), "counts": asdict(controller.counts)}
        world = environment.unwrapped
        records.append({**world.outcome(), **about, "force": force, "force_band": list(world.stable_band)})
        environment.close()
    return records


def present_pose(frame: dict[str, np.ndarray], spec: Any) -> np.ndarray:
    """The action that stays where the arms are."""
    poses = [frame[f"{side}_robot_tcp_pose"][: spec.pose_dim] for side in spec.arms]
    widths = [frame[f"{side}_robot_gripper_width"] for side in spec.arms]
    return np.concatenate([*poses, *widths]).astype(np.float64)


class ClosedLoop:
    """What `test` does in simulation: runs the cells, keeps what is done, makes figures and metrics.

    Records are written to `rollouts/` in the run folder as they come, so that a test that was cut short goes on, and
    to `rollouts.jsonl` in the end. They count only for the same weights and settings.
    """

    def __init__(self, module: "PolicyModule", rollout: RolloutSettings) -> None:
        self.module, self.settings = module, rollout
        self.folder = Path(module.trainer.default_root_dir)
        about = {"world": WORLD, "runtime": asdict(rollout.runtime), "denoising_steps": module.denoising_steps}
        self.tag = fingerprint(module, **about)  # the averaged weights, if there are any
        self.records = [record for record in self._read_parts() if record["tag"] == self.tag]
        self.figures: list[dict[str, str]] = []
        source = module.trainer.datamodule
        self.evaluation = RolloutEvaluation(module.spec.task, source.demonstration_mean)

    def _read_parts(self) -> list[dict[str, Any]]:
        """Records of earlier runs; a line that was cut off is left out."""
        found = []
        for path in sorted((self.folder / "rollouts").glob("part-*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    found.append(json.loads(line))
                except json.JSONDecodeError:  # what a later run appended to it is lost, the lines after it are not
                    continue
        return found

    def run(self, variations: Sequence[str], seeds: Sequence[int]) -> None:
        """Run the episodes of one batch that are not done yet; a batch has one variation."""
        variation = variations[0]
        done = {(record["variation"], record["seed"]) for record in self.records}
        todo = [seed for seed in seeds if (variation, seed) not in done]
        if todo:
            new = run_episodes(self.module, self.settings.runtime, variation, todo)
            self.records += [record | {"tag": self.tag} for record in new]
            self._write(self.records[-len(new) :])

    def _write(self, records: list[dict[str, Any]]) -> None:
        path = self.folder / "rollouts" / f"part-{distributed.rank()}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def finish(self) -> dict[str, float]:
        """Gather all records, write them, draw, and return the metrics; call it on every process."""
        records = self._gather()
        if rejected := sum(record["counts"]["rejected_plans"] for record in records):
            rank_zero_warn(f"{rejected} plans were not finite and not used: look at the weights", category=UserWarning)
        self.evaluation.add(records)  # on every process alike: the metric counts an episode once
        metrics = self.evaluation.compute()
        if self.settings.latency:
            metrics |= self._latency()
        if self.module.trainer.is_global_zero:
            part = self.folder / f"{FILE}.part"
            part.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            part.replace(self.folder / FILE)
            self.figures = self.evaluation.figures(records, self.folder)
            if self.settings.videos:
                self.figures += self._videos(records)
        return metrics

    def _latency(self) -> dict[str, float]:
        """Measured by one process while the others wait, and known to all."""
        measured = [measure_latency(self.module) if self.module.trainer.is_global_zero else {}]
        if distributed.world_size() > 1:
            torch.distributed.broadcast_object_list(measured, src=0)
        return measured[0]

    def _gather(self) -> list[dict[str, Any]]:
        """The records of all processes that this test asks for, in the order of cells and seeds."""
        parts: list[Any] = [self.records]
        if distributed.world_size() > 1:
            parts = [None] * distributed.world_size()
            torch.distributed.all_gather_object(parts, self.records)
        episodes = {(record["variation"], record["seed"]): record for part in parts for record in part}
        wanted = [episodes[item] for item in self.module.trainer.datamodule.closed_loop_items() if item in episodes]
        return [{key: value for key, value in record.items() if key != "tag"} for record in wanted]

    def _videos(self, records: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
        """One video a cell, of its first seed. Without EGL a warning."""
        first = {}
        for record in records:
            first.setdefault(record["variation"], record["seed"])
        made = []
        for variation, seed in first.items():
            pictures: list[np.ndarray] = []
            take = lambda environment, _, keep=pictures: keep.append(environment.render())  # noqa: E731
            try:
                run_episodes(self.module, self.settings.runtime, variation, [seed], take, render=True)
            except (UserError, ImportError, OSError, RuntimeError) as error:
                rank_zero_warn(f"no videos: {error}", category=UserWarning)
                return made
            path = self.folder / "figures" / f"rollout-{variation}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, np.stack(pictures), 24)
            title = f"{self.module.method}, {variation}, seed {seed}, simulation"
            made.append({"file": f"figures/{path.name}", "title": title, "kind": "video"})
        return made

    def protocol(self) -> str:
        """How the figures are counted, in words."""
        runtime = self.settings.runtime
        return (
            f"{self.evaluation.protocol(MAX_FRAMES)}; a plan every {runtime.chunk_every} frames, which takes effect "
            f"{runtime.latency} frames after its observation, {self.module.denoising_steps} DDIM steps"
        )
