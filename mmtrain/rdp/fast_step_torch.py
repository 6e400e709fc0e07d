"""The fast policy's step in PyTorch, on the CPU: the same interface as the NumPy form, for comparison and for training
code that has torch loaded anyway."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.config_errors import UserError
from mmtrain.normaliser import Normaliser
from mmtrain.rdp.fast_step import DecoderWeights, decoder_weights
from mmtrain.rdp.networks import TokenizerNetwork

Array = np.ndarray


@dataclass(slots=True)
class TorchState:
    """Where a plan's decoding is: its bias of the gates [3H], and the hidden state [1, H]."""

    bias: Tensor
    hidden: Tensor


class TorchDecoder:
    """`mmtrain.rdp.fast_step.FastDecoder` over PyTorch's fused GRU cell; NumPy arrays in and out.

    Normalising is multiplied into the weights, and the condition's part of the gates into their bias, once per plan.

    Args:
        weights: a trained decoder, see `decoder_weights`.
    """

    def __init__(self, weights: DecoderWeights, dtype: torch.dtype = torch.float32) -> None:
        self.touch_keys, self.touch_dim = weights.touch_keys, weights.touch_dim
        self.action_dim, self.condition_dim = weights.action_dim, weights.condition_dim
        self._dtype = dtype
        wide = {name: torch.as_tensor(np.asarray(getattr(weights, name), np.float64)) for name in _TENSORS}
        condition, touch = wide["weight_ih"].split([self.condition_dim, self.touch_dim], dim=1)
        self._condition = condition.to(dtype)
        self._touch = (touch * wide["touch_scale"]).to(dtype)
        self._constant = (wide["bias_ih"] + touch @ wide["touch_offset"]).to(dtype)
        self._recurrent, self._recurrent_bias = wide["weight_hh"].to(dtype), wide["bias_hh"].to(dtype)
        scale = wide["action_scale"]
        self._output = (wide["fc_weight"] / scale[:, None]).to(dtype)
        self._output_bias = ((wide["fc_bias"] - wide["action_offset"]) / scale).to(dtype)

    @classmethod
    def from_network(cls, network: TokenizerNetwork, normaliser: Normaliser) -> "TorchDecoder":
        """From a tokenizer and its normaliser of "action" and the touch streams."""
        return cls(decoder_weights(network.state_dict(), {key: normaliser.affine(key) for key in normaliser.widths}))

    def start(self, condition: Array) -> TorchState:
        """See `FastDecoder`."""
        condition = torch.as_tensor(np.asarray(condition), dtype=self._dtype)
        if condition.shape != (self.condition_dim,):
            raise UserError(f"condition: shape {tuple(condition.shape)}, the decoder takes ({self.condition_dim},)")
        hidden = torch.zeros(1, self._recurrent.shape[1], dtype=self._dtype)
        return TorchState(torch.addmv(self._constant, self._condition, condition), hidden)

    def fork(self, state: TorchState) -> TorchState:
        """See `FastDecoder`. Nothing is written in place, so that the tensors are shared."""
        return TorchState(state.bias, state.hidden)

    def advance(self, state: TorchState, touch: Array) -> None:
        """See `FastDecoder`."""
        seen = torch.as_tensor(touch, dtype=self._dtype)[None]
        state.hidden = torch.gru_cell(
            seen, state.hidden, self._touch, self._recurrent, state.bias, self._recurrent_bias
        )

    def action(self, state: TorchState) -> Array:
        """See `FastDecoder`."""
        return F.linear(state.hidden, self._output, self._output_bias)[0].numpy()

    def step(self, state: TorchState, touch: Array) -> Array:
        """`advance`, then `action`."""
        self.advance(state, touch)
        return self.action(state)

    def decode(self, condition: Array, touch: Array) -> Array:
        """See `FastDecoder`."""
        state = self.start(condition)
        for frame in touch:
            self.advance(state, frame)
        return self.action(state)


_TENSORS = (
    "weight_ih",
    "weight_hh",
    "bias_ih",
    "bias_hh",
    "fc_weight",
    "fc_bias",
    "action_scale",
    "action_offset",
    "touch_scale",
    "touch_offset",
)
