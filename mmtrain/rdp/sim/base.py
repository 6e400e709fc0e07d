"""The loop of all simulated tasks: 480 Hz physics under 24 Hz commands, sensing, perturbations, outcome (8.4)."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces

from mmtrain import marker_pca
from mmtrain.config_errors import UserError, nearest
from mmtrain.rdp.sim import frames, tactile, world
from mmtrain.rdp.sim.hand import Hand, Push
from mmtrain.robot_tasks import ARMS, FRAME_RATE, POSE_DIM, Task

SUBSTEPS = round(1 / (world.TIMESTEP * FRAME_RATE))  # 20
SENSOR_SUBSTEPS = 4  # a 120 Hz reading is the mean of 4 sub-steps
SETTLING = 120  # sub-steps before the first frame, at rest; the wrench is tared at their end
MAX_STEPS = 240  # 10 s, one limit for every method
CONTACT_FORCE = 0.2  # N: less is no contact
STOP_FORCE = 30.0  # N, true force at 120 Hz: the arm's protective stop
MAX_SPEED = (0.5 / FRAME_RATE, 1.0 / FRAME_RATE)  # m and rad a frame, the arm's own limits (4.3)
BEFORE_DISTANCE = 0.045  # m between tool and object at which "before" moves the hand
AFTER_FRAMES = (12, 60)  # frames of contact after which "after" moves the hand


class Streams(NamedTuple):
    """Independent random streams of one episode, so that switching one part off leaves the others as they were."""

    world: np.random.Generator
    push: np.random.Generator
    wrench: np.random.Generator
    vision: np.random.Generator
    markers: np.random.Generator


@dataclass
class ArmSensing:
    """One arm's part of a frame: addresses in the model and what its sensors remember."""

    side: str
    tcp: int
    first_sensor: int
    wrench: frames.WrenchSensor
    late_touch: dict[str, frames.Delay]


class ContactEnv(gymnasium.Env):
    """A task of tools under stiff servos that must keep a force on something held (gymnasium API).

    A subclass names its `task`, `variations` and `stable_band` and supplies `_build`, `_start`, `_controls`,
    `_distance`, `_draw_push`, `_advance` and `_score`. Everything random comes from the seed of `reset`; an episode
    repeats bit for bit. Commands are absolute poses in the task's action layout; between two of them the servos' set
    points move linearly at 480 Hz (for the hinges of a tool that is slerp up to second order).

    Args:
        images: picture keys to render: "external_img", "SIDE_wrist_img" or "SIDE_gripper{1,2}_img".
        size: pixels a side of pictures.
        markers: sensors whose marker fields go into frames; leaving one out saves time and changes nothing else.
        max_steps: frames after which an episode is cut.
        render_mode: "rgb_array" lets `render` draw the external view at 480 x 360.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": FRAME_RATE}
    task: ClassVar[Task]
    variations: ClassVar[tuple[str, ...]] = ("none", "before", "after")
    stable_band: ClassVar[tuple[float, float]]  # N
    object_body: ClassVar[str] = "object"
    stop_force: ClassVar[float] = STOP_FORCE

    def __init__(
        self,
        images: tuple[str, ...] = (),
        size: int = 84,
        markers: tuple[str, ...] = ("gelsight", "mctac"),
        max_steps: int = MAX_STEPS,
        render_mode: str | None = None,
    ) -> None:
        self.arms = ARMS[self.task]
        self.images, self.size, self.markers = tuple(images), size, tuple(markers)
        self.max_steps, self.render_mode = max_steps, render_mode
        self._check_options()
        self.shows = bool(images) or render_mode is not None  # visual-only parts are worth having
        self.action_dim = len(self.arms) * (POSE_DIM[self.task] + 1)
        self.action_space = spaces.Box(-np.inf, np.inf, (self.action_dim,), np.float32)
        shapes = frames.frame_widths(self.arms, self.markers)
        number_spaces = {key: spaces.Box(-np.inf, np.inf, shape, np.float32) for key, shape in shapes.items()}
        picture = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.observation_space = spaces.Dict(number_spaces | {key: picture for key in self.images})
        self._pictures = None

    # --- what a task supplies -------------------------------------------------------------------------------------

    def _build(self, rng: np.random.Generator) -> str:
        """Draw the episode's world and give its MJCF; keep what scoring needs to know on self."""
        raise NotImplementedError

    def _start(self, rng: np.random.Generator) -> np.ndarray:
        """Set points [nu] of the servos at the start."""
        raise NotImplementedError

    def _controls(self, action: np.ndarray) -> np.ndarray:
        """Set points [nu] of the servos for an action [A], float64."""
        raise NotImplementedError

    def _distance(self) -> float:
        """Metres between tool and object, for "before"."""
        raise NotImplementedError

    def _draw_push(self, rng: np.random.Generator, variation: str) -> Push:
        """The hand's movement for this episode's perturbation."""
        raise NotImplementedError

    def _advance(self, force: np.ndarray) -> bool:
        """Keep the score after a frame with true mean normal forces [arms] in N; True ends the episode."""
        raise NotImplementedError

    def _score(self) -> dict[str, float | bool | int]:
        """The task's numbers of the outcome, `score` among them."""
        raise NotImplementedError

    def _info(self) -> dict[str, Any]:
        """More for `info`."""
        return {}

    def _speed_limits(self) -> np.ndarray:
        """Largest change [nu] of the set points in a frame: the arm's own."""
        slides = self.model.jnt_type[self.model.actuator_trnid[:, 0]] == mujoco.mjtJoint.mjJNT_SLIDE
        return np.where(slides, *MAX_SPEED)

    def _show(self) -> None:
        """Bring visual-only parts up to date before a picture is taken."""

    # --- gymnasium ------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode.

        Args:
            options: {"variation": one of `variations`}; the first of them if it is not given.

        Raises:
            UserError: an unknown variation.
        """
        super().reset(seed=seed)
        self.variation = (options or {}).get("variation", self.variations[0])
        self._check_variation()
        episode_seed = int(self.np_random.integers(2**31)) if seed is None else seed
        children = np.random.SeedSequence(episode_seed).spawn(len(Streams._fields))
        self._rng = Streams(*(np.random.default_rng(child) for child in children))
        self.model = mujoco.MjModel.from_xml_string(self._build(self._rng.world))
        self.data = mujoco.MjData(self.model)
        self._close_pictures()
        self._prepare_push()
        self._settle()
        self._prepare_sensing()
        self._steps, self._contact_frames = 0, 0
        self._forces: list[np.ndarray] = []
        self._peak, self._stopped = 0.0, False
        self._force = np.zeros(len(self.arms))
        self.last_action = self._held_action()
        return self._frame(), self._all_info()

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Send a command [A] and let 1/24 s pass.

        The reward is the score so far, minus the score before: its sum over an episode is the score.

        Raises:
            ValueError: a command of another width, or one that is not finite.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (self.action_dim,) or not np.isfinite(action).all():
            raise ValueError(f"an action of {self.task} is {self.action_dim} finite numbers; got {action}")
        self.last_action = action
        self._begin_push()
        readings = self._simulate(self._controls(action))
        self._steps += 1
        touch = readings[:, [arm.first_sensor + 6 for arm in self._sensing]]
        self._force = touch.mean(0)
        self._forces.append(self._force)
        self._contact_frames += bool(self._force.min() > CONTACT_FORCE)
        self._peak = max(self._peak, float(touch.max()))
        self._stopped = self._peak > self.stop_force
        before = self._score_now
        ended = self._advance(self._force) or self._stopped
        self._score_now = float(self._score()["score"])
        truncated = not ended and self._steps >= self.max_steps
        return self._frame(readings[-1]), self._score_now - before, ended, truncated, self._all_info()

    def render(self) -> np.ndarray:
        """The external view, uint8 [360, 480, 3]."""
        return self._picture("external", 480, 360)

    def close(self) -> None:
        """Free the renderer."""
        self._close_pictures()

    def outcome(self) -> dict[str, float | bool | int]:
        """What the episode came to, as plain numbers; may be asked at any time.

        `frames`, `peak_force` (N, 120 Hz), `mean_contact_force` (N), `stable_force_share` (share of the frames with
        contact whose force is inside the task's band, of every arm), `stopped_for_force`, `perturbed_at` (frame, -1 if
        never), and the task's own numbers with `score`.
        """
        forces = np.array(self._forces).reshape(-1, len(self.arms))
        touched = forces[(forces > CONTACT_FORCE).all(1)]
        stable = ((touched >= self.stable_band[0]) & (touched <= self.stable_band[1])).all(1)
        return {
            "frames": self._steps,
            "peak_force": self._peak,
            "mean_contact_force": float(touched.mean()) if len(touched) else 0.0,
            "stable_force_share": float(stable.mean()) if len(touched) else 0.0,
            "stopped_for_force": self._stopped,
            "perturbed_at": self._perturbed_at,
            **self._score(),
        }

    # --- physics --------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        self._set_points = np.array(self._start(self._rng.world), np.float64)
        joints = self.model.actuator_trnid[:, 0]
        self.data.qpos[self.model.jnt_qposadr[joints]] = self._set_points
        self.data.ctrl[:] = self._set_points
        self._limits = self._speed_limits()
        mujoco.mj_step(self.model, self.data, SETTLING)
        self._share = np.arange(1, SUBSTEPS + 1)[:, None] / SUBSTEPS
        self._readings = np.empty((SUBSTEPS, self.model.nsensordata))
        self._score_now = 0.0

    def _simulate(self, target: np.ndarray) -> np.ndarray:
        """20 sub-steps towards set points [nu]; sensor readings at 120 Hz, [5, sensors]."""
        change = np.minimum(np.maximum(target - self._set_points, -self._limits), self._limits)
        path = self._set_points + self._share * change
        self._set_points = path[-1].copy()
        model, data, readings, ctrl = self.model, self.data, self._readings, self.data.ctrl
        sensordata, step = data.sensordata, mujoco.mj_step
        hand = self._hand if self._hand is not None and self._hand.is_moving else None
        for index in range(SUBSTEPS):
            if hand is not None:
                hand.move()
            ctrl[:] = path[index]
            step(model, data)
            readings[index] = sensordata
        return readings.reshape(SUBSTEPS // SENSOR_SUBSTEPS, SENSOR_SUBSTEPS, -1).mean(1)

    # --- perturbation ---------------------------------------------------------------------------------------------

    def _prepare_push(self) -> None:
        self._perturbed_at = -1
        self._after = int(self._rng.push.integers(AFTER_FRAMES[0], AFTER_FRAMES[1] + 1))
        pushes = self.variation in ("before", "after")
        self._hand = Hand(self.data, self._draw_push(self._rng.push, self.variation)) if pushes else None

    def _begin_push(self) -> None:
        if self._perturbed_at >= 0 or self._hand is None:
            return
        due = self._distance() < BEFORE_DISTANCE if self.variation == "before" else self._contact_frames >= self._after
        if due:
            self._perturbed_at, self._hand.is_moving = self._steps, True

    # --- sensing --------------------------------------------------------------------------------------------------

    def _prepare_sensing(self) -> None:
        self._sensing = []
        wrench_rngs = self._rng.wrench.spawn(len(self.arms))
        for index, side in enumerate(self.arms):
            first = self.model.sensor(f"{side}_touch").adr[0] - 6
            self._sensing.append(
                ArmSensing(
                    side=side,
                    tcp=self.model.site(f"{side}_tcp").id,
                    first_sensor=first,
                    wrench=frames.WrenchSensor(-self.data.sensordata[first : first + 6], wrench_rngs[index]),
                    late_touch={sensor: frames.Delay(frames.SENSOR_DELAY[sensor]) for sensor in self.markers},
                )
            )
        self._tare = [-self.data.sensordata[arm.first_sensor : arm.first_sensor + 6] for arm in self._sensing]
        self._object = self.model.body(self.object_body).id
        self._vision = frames.CoarseVision(self._rng.vision)
        self._late_pose = frames.Delay(frames.CAMERA_DELAY)
        self._late_pictures = {key: frames.Delay(frames.CAMERA_DELAY) for key in self.images}
        self._marker_rng = dict(zip(("gelsight", "mctac"), self._rng.markers.spawn(2), strict=True))

    def _frame(self, readings: np.ndarray | None = None) -> dict[str, np.ndarray]:
        readings = self.data.sensordata if readings is None else readings
        frame: dict[str, np.ndarray] = {}
        presses = []
        for arm, tare in zip(self._sensing, self._tare, strict=True):
            truth = -readings[arm.first_sensor : arm.first_sensor + 6]  # MuJoCo gives what the tool does to the pad
            self._arm_frame(frame, arm, truth)
            presses.append(self._marker_frame(frame, arm, truth - tare))
        rotation = self.data.xmat[self._object].reshape(3, 3)
        frame["object_pose"] = self._late_pose(self._vision(self.data.xpos[self._object], rotation)).astype(np.float32)
        for key in self.images:
            frame[key] = self._tactile(key, frame, presses) if "_gripper" in key else self._late_view(key)
        return frame

    def _arm_frame(self, frame: dict[str, np.ndarray], arm: ArmSensing, truth: np.ndarray) -> None:
        velocity = np.empty(6)
        mujoco.mj_objectVelocity(self.model, self.data, mujoco.mjtObj.mjOBJ_SITE, arm.tcp, velocity, 0)
        name = f"{arm.side}_robot_"
        frame[name + "tcp_pose"] = self._tcp_pose(arm.tcp).astype(np.float32)
        frame[name + "tcp_vel"] = np.concatenate([velocity[3:], velocity[:3]]).astype(np.float32)
        frame[name + "tcp_wrench"] = arm.wrench(truth).astype(np.float32)
        width, force = self._gripper(arm.side)
        frame[name + "gripper_width"] = np.array([width], np.float32)
        frame[name + "gripper_force"] = np.array([force], np.float32)

    def _gripper(self, side: str) -> tuple[float, float]:
        """Width in metres and force in newtons of the gripper: it stays closed around its tool."""
        return 0.03, 20.0

    def _marker_frame(self, frame: dict[str, np.ndarray], arm: ArmSensing, press: np.ndarray) -> dict[int, Any]:
        """Marker fields of the tool's grasp, late by each sensor's delay, into `frame`; the late presses by number."""
        late = {}
        for number, sensor in frames.GRIPPER_SENSORS.items():
            if sensor not in self.markers:
                continue
            late[number] = arm.late_touch[sensor](press)
            offsets = tactile.wrench_offsets(sensor, late[number], self._marker_rng[sensor])
            name = f"{arm.side}_gripper{number}_"
            frame[name + "initial_marker"] = tactile.marker_grid(sensor).copy()  # frames share nothing
            frame[name + "marker_offset"] = offsets
            frame[name + "marker_offset_emb"] = marker_pca.embed(tactile.press_pca(sensor), offsets)
        return late

    def _late_view(self, key: str) -> np.ndarray:
        return self._late_pictures[key](self._picture(key.removesuffix("_img"), self.size, self.size))

    def _tactile(self, key: str, frame: dict[str, np.ndarray], presses: list[dict[int, Any]]) -> np.ndarray:
        """A tactile picture, drawn from a marker field that is late already."""
        side, number = key.removesuffix("_img").split("_gripper")
        press = presses[self.arms.index(side)][int(number)]
        offsets = frame[f"{side}_gripper{number}_marker_offset"]
        return tactile.tactile_image(frames.GRIPPER_SENSORS[int(number)], offsets, float(press[2]), self.size)

    def _picture(self, camera: str, width: int, height: int) -> np.ndarray:
        from mmtrain.rdp.sim.rendering import Pictures  # OpenGL is loaded only when a picture is asked for

        self._show()
        if self._pictures is None:
            self._pictures = Pictures(self.model)
        return self._pictures.take(self.data, camera, width, height)

    def _close_pictures(self) -> None:
        if self._pictures is not None:
            self._pictures.close()
            self._pictures = None

    # --- the rest -------------------------------------------------------------------------------------------------

    def _held_action(self) -> np.ndarray:
        """The command [A] that holds the tools where they are."""
        poses = [self._tcp_pose(arm.tcp)[: POSE_DIM[self.task]] for arm in self._sensing]
        return np.concatenate([*poses, [self._gripper(side)[0] for side in self.arms]])

    def _tcp_pose(self, site: int) -> np.ndarray:
        matrix, pose = self.data.site_xmat[site], np.empty(9)
        pose[:3] = self.data.site_xpos[site]
        pose[3:6], pose[6:] = matrix[::3], matrix[1::3]  # columns
        return pose

    def _all_info(self) -> dict[str, Any]:
        force = float(self._force[0]) if len(self.arms) == 1 else self._force.copy()
        return {
            "force": force,
            "contact": bool(self._force.min() > CONTACT_FORCE),
            "perturbed": self._perturbed_at >= 0,
            "frame": self._steps,
            **self._info(),
        }

    def _check_options(self) -> None:
        known = ["external_img"] + [f"{side}_wrist_img" for side in self.arms]
        known += [f"{side}_gripper{number}_img" for side in self.arms for number in frames.GRIPPER_SENSORS]
        for key in self.images:
            if key not in known:
                guess = nearest(key, known)
                hint = f", did you mean {guess}?" if guess else ""
                raise UserError(f"images: {key} is not a picture of {self.task}{hint} {known}")
            number = key.removesuffix("_img").partition("_gripper")[2]
            if number and frames.GRIPPER_SENSORS[int(number)] not in self.markers:
                raise UserError(
                    f"images: {key} needs {frames.GRIPPER_SENSORS[int(number)]} among markers {self.markers}"
                )
        for sensor in self.markers:
            if sensor not in frames.SENSOR_DELAY:
                raise UserError(f"markers: {sensor} is not known {list(frames.SENSOR_DELAY)}")

    def _check_variation(self) -> None:
        if self.variation not in self.variations:
            guess = nearest(str(self.variation), self.variations)
            hint = f", did you mean {guess}?" if guess else ""
            raise UserError(f"variation: {self.variation} is not one of {self.task}'s {list(self.variations)}{hint}")
