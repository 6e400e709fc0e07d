"""The knowledge encoder of StoryWeaver (arXiv 2412.07375, eq. 12 and 13)."""

from torch import Tensor, nn

HIDDEN = 64


class KnowledgeEncoder(nn.Module):
    """From a character's description to where the picture shows it: 98,948 parameters for features of width 768.

    Parameters are named as in the released checkpoint (`mean_predictor.0.weight` and so on).

    Args:
        feature_width: of the pooled text feature of a description.
    """

    def __init__(self, feature_width: int) -> None:
        super().__init__()
        self.mean_predictor = _head(feature_width)
        self.cor_predictor = _head(feature_width)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Corrections to the prior.

        Args:
            features: pooled text features [..., P].

        Returns:
            Offset of the centre [..., 2] in (-1, 1), vertical and horizontal, in halves of the picture; change of the
            covariance [..., 2] in (-1, 1): 1 + it is the variance of each axis, relative to the prior's.
        """
        return self.mean_predictor(features), self.cor_predictor(features)


def _head(feature_width: int) -> nn.Sequential:
    layers = (nn.Linear(feature_width, HIDDEN), nn.LeakyReLU(), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 2), nn.Tanh())
    return nn.Sequential(*layers)
