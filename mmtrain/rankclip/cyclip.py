"""CyCLIP (arXiv 2205.14459): CLIP with cyclic consistency within and across the modalities."""

from torch import Tensor

from mmtrain.optim import AdamWSettings
from mmtrain.rankclip.losses import RowObjective, cyclip_objective
from mmtrain.rankclip.module import ImageTextModule, LossSettings


class CyClip(ImageTextModule):
    """CyCLIP, see `cyclip_objective`; other settings: `ImageTextModule`.

    Args:
        inmodal: lambda1; 0.25 in the authors' command.
        cross: lambda2; 0.25 likewise.
    """

    def __init__(
        self,
        architecture: str = "RN50-quickgelu",
        inmodal: float = 0.25,
        cross: float = 0.25,
        optim: AdamWSettings | None = None,
        loss: LossSettings | None = None,
        micro_batch: int | None = None,
        pretrained: str | None = None,
    ) -> None:
        super().__init__(architecture, optim, loss, micro_batch, pretrained)
        self.save_hyperparameters()
        self.inmodal, self.cross = inmodal, cross

    def objective(self, features: tuple[Tensor, ...]) -> RowObjective:
        return cyclip_objective(self.inmodal, self.cross, self.loss_settings.dtype)
