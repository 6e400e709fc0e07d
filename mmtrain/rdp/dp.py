"""Diffusion Policy (arXiv 2303.04137), with and without touch: the baseline of RDP's Tables II to V."""

from typing import Any

from torch import Tensor

from mmtrain.rdp.module import PolicyModule
from mmtrain.robot_tasks import Task, Touch, Vision, policy_spec

ROWS = {
    "none": "DP",
    "image": "DP w. tactile img.",
    "force": "DP w. force",  # no row of the paper: the fair control of RDP (Force)
    "normal_force": "DP w. normal force",
}


class DiffusionPolicy(PolicyModule):
    """Diffuses 16 actions at 12 Hz, which are executed as they are until the next plan.

    Args:
        task, touch, vision, relative: see `mmtrain.robot_tasks.policy_spec`; the data module has the same.
        kwargs: settings of `PolicyModule`.
    """

    def __init__(
        self,
        task: Task,
        touch: Touch = "none",
        vision: Vision = "camera",
        relative: bool | None = None,
        **kwargs: Any,
    ) -> None:
        spec = policy_spec(task, touch, "dp", vision, relative)
        super().__init__(spec=spec, channels=spec.action_dim, length=spec.horizon, kernel_size=5, **kwargs)

    @property
    def method(self) -> str:
        """The row's name in the paper's tables; Table V's are named by the settings of the rollout."""
        row = ROWS.get(self.spec.touch, "DP w. tactile emb.")
        return f"{row}{self.rollout.suffix}"

    def target(self, batch: dict[str, Any]) -> Tensor:
        return self.normalizer.normalise("action", batch["action"])

    def rows(self, sampled: Tensor) -> Tensor:
        return self.normalizer.unnormalise("action", sampled)[:, self.spec.now :]

    def predicted(self, sampled: Tensor, batch: dict[str, Any]) -> Tensor:
        return self.normalizer.unnormalise("action", sampled)
