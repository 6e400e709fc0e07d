"""The scripted person of the lifting task: finds the cup by coarse vision, grips it by feel (specification 8.4)."""

from typing import Literal

import numpy as np

from mmtrain.rdp.sim.frames import CAMERA_DELAY, Delay
from mmtrain.rdp.sim.lift import CUP_HALF, arc_shift

SIDES = ("left", "right")
INWARD = np.array([1.0, -1.0])  # direction along world x in which the left and the right arm close
APPROACH = 0.006  # m a frame, at most
CLEARANCE = 0.016  # m between pad and cup before closing; vision may be wrong by three standard deviations of 3 mm
REACHED = 0.0005  # m
LOOKS = 6  # frames of vision before closing may begin
CLOSING = 0.0018  # m a frame until touched; at the proposed 2.5 mm hard cups are hit with up to 3.7 N
TOUCHED = 0.4  # N, smoothed: the 0.25 N of section 8.4 would be mostly noise
GRIP = 2.0  # N; 2.4 N compress the soft cup too far, 1.84 N just hold the heaviest and smoothest
GAIN, FASTEST_GRIP = 0.0003, 0.001  # m per N and frame, m a frame
SETTLED, SETTLING_FRAMES = 0.3, 7  # N from the grip, frames in a row
SMOOTHING = 0.5, 0.25  # share of the newest force in the estimate that finds the touch, and that calls the grip settled
LIFT_FRAMES = 56
LIFT_HEIGHT = 0.168  # m
BLIND_SQUEEZE = 0.005  # m a side, pads included: what hand and eye aim for; a soft cup wants 8 mm, a hard one 2.7
TRIAL_LIFT = 0.25  # share of the way that is done four times slower when only watching
SEEN_SLIP, REGRIP, REGRIP_FRAMES = 0.003, 0.0015, 8  # m that the cup stays behind, m a side more, frames of waiting
BLIND_NOISE, BLIND_MEMORY, BLIND_DELAY = 0.002, 0.98, 6  # m, per frame, frames (0.25 s)


class LiftExpert:
    """One episode's demonstrator of `LiftBimanual-v0`; make a new one for each.

    Approach beside the cup, close until both sides are felt, bring the grip to 2 N by moving both arms 0.3 mm per
    N and frame, lift along the arc it drew (left or right, equally likely), and keep the grip while holding.

    Args:
        mode: "tactar" as above; "vr_only" squeezes by sight alone, 0.25 s late and with 2 mm of noise.
        rng: draws the arc, the speed and, for "vr_only", the noise.
    """

    def __init__(self, mode: Literal["tactar", "vr_only"], rng: np.random.Generator) -> None:
        self._blind, self._rng = mode == "vr_only", rng
        self.arc = float(rng.choice([-1.0, 1.0]))
        self._lift_frames = LIFT_FRAMES * rng.uniform(0.9, 1.1)
        self._grip = GRIP + rng.normal(0, 0.03)
        self._phase = "approach"
        self._command: np.ndarray | None = None  # [2, 3] m, both arms
        self._widths = np.zeros(2)
        self._looks: list[np.ndarray] = []
        self._felt = np.zeros(2)
        self._settled = self._progress = 0.0
        self._settling = 0
        self._late: Delay[np.ndarray] = Delay(BLIND_DELAY)
        self._late_height: Delay[float] = Delay(CAMERA_DELAY)
        self._slip, self._wait = np.inf, 0  # m by which the cup was seen below its place in the hands; frames
        self._tremble = np.zeros((2, 3))

    def act(self, frame: dict[str, np.ndarray], info: dict | None = None) -> np.ndarray:
        """Command [8] for the next frame: left and right position (m), both widths; `info` is not looked at."""
        if self._command is None:
            self._command = np.stack([frame[f"{side}_robot_tcp_pose"][:3] for side in SIDES]).astype(np.float64)
            self._widths = np.concatenate([frame[f"{side}_robot_gripper_width"] for side in SIDES])
        force = np.array([frame[f"{side}_robot_tcp_wrench"][2] for side in SIDES], np.float64)
        self._felt += SMOOTHING[0] * (force - self._felt)
        getattr(self, f"_{self._phase}")(frame, force)
        sent = self._command
        if self._blind:
            share = np.sqrt(1 - BLIND_MEMORY**2)
            self._tremble = BLIND_MEMORY * self._tremble + share * BLIND_NOISE * self._rng.standard_normal((2, 3))
            sent = self._late(sent.copy()) + self._tremble
        return np.concatenate([sent.ravel(), self._widths])

    def _approach(self, frame: dict[str, np.ndarray], force: np.ndarray) -> None:
        self._looks.append(frame["object_pose"][:3])
        goal = self._beside(CLEARANCE)
        way = goal - self._command
        distance = np.linalg.norm(way, axis=1, keepdims=True)
        self._command = self._command + way * np.minimum(1, APPROACH / np.maximum(distance, 1e-9))
        if distance.max() < REACHED + APPROACH and len(self._looks) >= LOOKS:
            self._phase = "close_by_sight" if self._blind else "close"

    def _beside(self, clearance: float) -> np.ndarray:
        """Places [2, 3] of both arms beside the cup as it was seen so far, away from its sides (negative: inside)."""
        goal = np.tile(np.mean(self._looks, axis=0), (2, 1))
        goal[:, 0] -= INWARD * (CUP_HALF + clearance)
        return goal

    def _close(self, frame: dict[str, np.ndarray], force: np.ndarray) -> None:
        touched = self._felt > TOUCHED
        if touched.all():
            self._phase = "settle"
            self._settled = float(self._felt.mean())
        self._command[:, 0] += INWARD * CLOSING * ~touched

    def _close_by_sight(self, frame: dict[str, np.ndarray], force: np.ndarray) -> None:
        goal = self._beside(-BLIND_SQUEEZE)[:, 0]
        way = goal - self._command[:, 0]
        self._command[:, 0] += np.clip(way, -CLOSING, CLOSING)
        self._settling = self._settling + 1 if np.abs(way).max() < REACHED else 0
        if self._settling >= BLIND_DELAY + SETTLING_FRAMES:
            self._phase = "lift"

    def _settle(self, frame: dict[str, np.ndarray], force: np.ndarray) -> None:
        self._squeeze(force)
        self._settled += SMOOTHING[1] * (force.mean() - self._settled)
        self._settling = self._settling + 1 if abs(self._settled - self._grip) < SETTLED else 0
        if self._settling >= SETTLING_FRAMES:
            self._phase = "lift"

    def _lift(self, frame: dict[str, np.ndarray], force: np.ndarray) -> None:
        before = lift_path(self._progress)
        if self._blind:
            self._look_for_slip(frame)
        self._wait = max(0, self._wait - 1)
        if self._wait == 0:
            slow = 4 if self._blind and self._progress < TRIAL_LIFT else 1
            self._progress = min(1.0, self._progress + 1 / (slow * self._lift_frames))
        after = lift_path(self._progress)
        self._command[:, 0] += self.arc * (after[0] - before[0])
        self._command[:, 2] += after[1] - before[1]
        if not self._blind:
            self._squeeze(force)

    def _look_for_slip(self, frame: dict[str, np.ndarray]) -> None:
        """Squeeze more, and wait, each time the cup is seen to stay further behind the hands."""
        hands = self._late_height(float(np.mean([frame[f"{side}_robot_tcp_pose"][2] for side in SIDES])))
        behind = hands - float(frame["object_pose"][2])
        if self._slip == np.inf:
            self._slip = behind
        if behind > self._slip + SEEN_SLIP and self._wait == 0:
            self._slip, self._wait = behind, REGRIP_FRAMES
            self._command[:, 0] += INWARD * REGRIP

    def _squeeze(self, force: np.ndarray) -> None:
        """Integral control of the gap; the arms move alike, so that noise does not carry the cup away."""
        step = np.clip(GAIN * (self._grip - force.mean()), -FASTEST_GRIP, FASTEST_GRIP)
        self._command[:, 0] += INWARD * step


def lift_path(progress: float) -> tuple[float, float]:
    """Sideways shift and height (m) of the arc at a progress in [0, 1]; starts and ends without speed."""
    eased = progress**3 * (10 - 15 * progress + 6 * progress**2)
    height = LIFT_HEIGHT * eased
    return arc_shift(height), height
