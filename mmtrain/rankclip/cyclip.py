"""CyCLIP (arXiv 2205.14459): CLIP with cyclic consistency within and across the modalities."""

from typing import Any

from torch import Tensor

from mmtrain.rankclip.losses import RowObjective, cyclip_objective
from mmtrain.rankclip.module import ImageTextModule


class CyClip(ImageTextModule):
    """CyCLIP, see `cyclip_objective`.

    Args:
        inmodal: lambda1; 0.25 in the authors' command.
        cross: lambda2; 0.25 likewise.
        kwargs: settings of `ImageTextModule`.
    """

    method = "CyCLIP"

    def __init__(
        self,
        inmodal: float = 0.25,
        cross: float = 0.25,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.inmodal, self.cross = inmodal, cross

    def objective(self, features: tuple[Tensor, ...]) -> RowObjective:
        return cyclip_objective(self.inmodal, self.cross, self.loss_settings.dtype)
