"""Residual vector quantisation with codebooks that follow their members (spec section 2; off in every released run).

N vectors, D numbers in each, K codes of a stage. Buffer names are those of the released checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DECAY = 0.8  # of the moving averages that a codebook is made of
SMOOTHING = 1e-5  # keeps a code without members from dividing by zero
DEAD = 1e-2  # a code whose average number of members falls below this is dead


class Codebook(nn.Module):
    """K codes; each moves to the mean of the vectors that were nearest to it lately (van den Oord 2017, appendix A.1).

    The first training batch initialises the codes with random vectors of it. A dead code is replaced by a random
    vector of the batch; the library behind the released code keeps dead codes by default.
    """

    def __init__(self, dim: int, codes: int) -> None:
        super().__init__()
        self.register_buffer("initted", torch.zeros(1))
        self.register_buffer("cluster_size", torch.ones(1, codes))
        embed = torch.empty(1, codes, dim)
        nn.init.kaiming_uniform_(embed)
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """Numbers [N] of the codes nearest to vectors [N, D]."""
        return torch.cdist(x, self.embed[0]).argmin(dim=-1)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Take random vectors of the first batch [N, D] as codes."""
        if not self.initted.item():
            self._replace(torch.ones(self.embed.shape[1], dtype=torch.bool, device=x.device), x)
            self.initted.fill_(1.0)

    @torch.no_grad()
    def follow(self, x: Tensor, nearest: Tensor) -> None:
        """Move the codes towards the means of their members: vectors [N, D] whose nearest codes are [N]."""
        members = F.one_hot(nearest, self.embed.shape[1]).to(x.dtype)
        self.cluster_size[0].lerp_(members.sum(0), 1 - DECAY)
        self.embed_avg[0].lerp_(members.T @ x, 1 - DECAY)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + SMOOTHING) / (total + SMOOTHING * self.embed.shape[1]) * total
        self.embed.copy_(self.embed_avg / smoothed[..., None])
        self._replace(self.cluster_size[0] < DEAD, x)

    def _replace(self, which: Tensor, x: Tensor) -> None:
        """Give the codes marked in `which` [K] one member each, a random vector of the batch."""
        drawn = x[torch.randint(len(x), (len(which),), device=x.device)]
        self.embed[0] = torch.where(which[:, None], drawn, self.embed[0])
        self.embed_avg[0] = torch.where(which[:, None], drawn, self.embed_avg[0])
        self.cluster_size[0] = torch.where(which, 1.0, self.cluster_size[0])


class Stage(nn.Module):
    """One codebook, under the name that the released checkpoints give it."""

    def __init__(self, dim: int, codes: int) -> None:
        super().__init__()
        self._codebook = Codebook(dim, codes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of vectors [N, D], without gradient, their numbers [N], and the commitment loss."""
        if self.training:
            self._codebook.initialise(x.detach())
        nearest = self._codebook.nearest(x)
        code = self._codebook.embed[0][nearest]  # a copy, so that moving the codes leaves it as it is
        if not self.training:
            return code, nearest, x.new_zeros(())
        self._codebook.follow(x.detach(), nearest)
        return code, nearest, F.mse_loss(x, code)


class ResidualVQ(nn.Module):
    """Each stage quantises what the stages before it left over; the sum of their codes stands for the vector.

    Args:
        dim: D.
        codes: K of each stage.
        stages: how many codebooks.
    """

    def __init__(self, dim: int, codes: int, stages: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Stage(dim, codes) for _ in range(stages))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise vectors [..., D].

        Returns:
            the sums of codes [..., D], in training with the gradient passed straight through; the numbers of the codes
            [..., stages]; the commitment loss, mean squared distance to the codes summed over the stages, 0 in
            evaluation.
        """
        rest, total = x.reshape(-1, x.shape[-1]), 0.0
        numbers, losses = [], []
        for layer in self.layers:
            code, nearest, loss = layer(rest)
            rest, total = rest - code, total + code
            numbers.append(nearest)
            losses.append(loss)
        codes = torch.stack(numbers, dim=-1).unflatten(0, x.shape[:-1])
        total = total.view(x.shape)
        return x + (total - x).detach() if self.training else total, codes, torch.stack(losses).sum()
