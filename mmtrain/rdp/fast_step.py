"""The fast policy's step in NumPy: a GRU that is carried from frame to frame, for a control loop without torch.

`NumpyDecoder.from_checkpoint` reads a trained checkpoint (which needs torch once); `save_npz` and `load_npz` keep what
it needs, so that the process that drives the robot imports neither torch nor this project's training code.

The released code runs the GRU from zero over all frames at every control step (spec 4.2). Carrying its state gives the
same numbers, since the condition is one vector for the whole plan and frames come once and in order: `step` against
`decode`. What a step costs is the number of NumPy calls, so that everything constant is multiplied out beforehand:
normalising, the condition's part of the gates (once per plan), un-normalising, and all gates stand in one matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmtrain.config_errors import UserError

Array = np.ndarray

_GRU = ("rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0", "fc.weight", "fc.bias")
_FORMAT = 1  # of the .npz files


class FastDecoder(Protocol):
    """What turns a plan's condition and touch into actions. All in physical units, for one robot, in one thread.

    Attributes:
        touch_keys: streams whose numbers make up the touch vector, in this order; () if not known.
        touch_dim: F, length of the touch vector; may be 0.
        action_dim: A.
        condition_dim: numbers of a plan's condition.
    """

    touch_keys: tuple[str, ...]
    touch_dim: int
    action_dim: int
    condition_dim: int

    def decode(self, condition: Array, touch: Array) -> Array:
        """Action [A] after the frames of touch [k, F], oldest first, from a zero state: the prefix form."""

    def start(self, condition: Array) -> Any:
        """State before the first frame of a plan, for its condition [C * L]."""

    def advance(self, state: Any, touch: Array) -> None:
        """Take in one frame of touch [F]; changes `state`."""

    def action(self, state: Any) -> Array:
        """Action [A] after the frames taken in so far."""

    def fork(self, state: Any) -> Any:
        """A copy of `state` that can go its own way."""


@dataclass(frozen=True)
class DecoderWeights:
    """A trained decoder: GRU with H units (PyTorch's layout, gates r, z, n), linear layer, and normalisers.

    Args:
        weight_ih: [3H, D + F], the condition's columns first.
        weight_hh: [3H, H]; bias_ih, bias_hh: [3H]; fc_weight: [A, H]; fc_bias: [A].
        action_scale, action_offset: [A]; touch_scale, touch_offset: [F]: normalised = x * scale + offset.
        touch_keys: names of the touch streams, in the order of their numbers.
    """

    weight_ih: Array
    weight_hh: Array
    bias_ih: Array
    bias_hh: Array
    fc_weight: Array
    fc_bias: Array
    action_scale: Array
    action_offset: Array
    touch_scale: Array
    touch_offset: Array
    touch_keys: tuple[str, ...] = ()

    @property
    def touch_dim(self) -> int:
        """F."""
        return len(self.touch_scale)

    @property
    def condition_dim(self) -> int:
        """D."""
        return self.weight_ih.shape[1] - self.touch_dim

    @property
    def action_dim(self) -> int:
        """A."""
        return len(self.fc_bias)


def decoder_weights(state: Mapping[str, Any], affines: Mapping[str, Any] | None = None) -> DecoderWeights:
    """The decoder inside a state dict.

    Args:
        state: tensors or arrays of a `TokenizerNetwork`, a `Tokenizer`, or a policy that holds one.
        affines: key -> something with `scale` and `offset`, for "action" and every touch stream; None takes those of
            the tokenizer's `normalizer` in `state`. Touch streams are all keys but "action", in alphabetical order.

    Raises:
        UserError: no decoder in it, several, or normalisers that are missing, not fitted or of another width.
    """
    found = [key for key in state if key.endswith("decoder." + _GRU[0])]
    if len(found) != 1:
        raise UserError(f"expected one fast decoder (...decoder.{_GRU[0]}) among the weights, found {found or 'none'}")
    prefix = found[0].removesuffix(_GRU[0])
    gru = [_array(state[prefix + name]) for name in _GRU]
    owner = prefix.removesuffix("decoder.").removesuffix("network.")
    pairs = _affines_in(state, owner + "normalizer.params_dict.") if affines is None else affines
    if "action" not in pairs:
        raise UserError(f"the weights hold no normaliser of action beside the decoder (has {sorted(pairs)})")
    pairs = {key: (_array(pair.scale), _array(pair.offset)) for key, pair in pairs.items()}
    if bad := [key for key, pair in pairs.items() if not np.isfinite(pair).all()]:
        raise UserError(f"the normaliser of {', '.join(bad)} is not fitted: train the tokenizer first")
    keys = tuple(sorted(set(pairs) - {"action"}))
    scale, offset = ([pairs[key][part] for key in keys] for part in (0, 1))
    touch = (np.concatenate(scale), np.concatenate(offset)) if keys else (np.zeros(0), np.zeros(0))
    if len(pairs["action"][0]) != len(gru[5]):
        raise UserError(f"the action normaliser has {len(pairs['action'][0])} numbers, the decoder gives {len(gru[5])}")
    if len(touch[0]) >= gru[0].shape[1]:
        raise UserError(
            f"touch of {len(touch[0])} numbers {list(keys)} does not fit a decoder of {gru[0].shape[1]} inputs"
        )
    return DecoderWeights(*gru, *pairs["action"], *touch, touch_keys=keys)


@dataclass(slots=True)
class DecoderState:
    """Where a plan's decoding is.

    Args:
        gates: [4H, F + H + 1], all weights of the gates; the last column is the plan's constant part.
        inputs: [F + H + 1], touch, hidden state and 1, side by side, so that one product gives all gates.
        hidden, output_inputs: views of `inputs`: [H] and [H + 1].
    """

    gates: Array
    inputs: Array
    hidden: Array
    output_inputs: Array


class NumpyDecoder:
    """`FastDecoder` in NumPy.

    Args:
        weights: a trained decoder.
        dtype: float32, or float64 for comparisons.
    """

    def __init__(self, weights: DecoderWeights, dtype: type = np.float32) -> None:
        self.weights = weights
        self.touch_keys, self.touch_dim = weights.touch_keys, weights.touch_dim
        self.action_dim, self.condition_dim = weights.action_dim, weights.condition_dim
        self._dtype = np.dtype(dtype)
        self._size = size = weights.weight_hh.shape[1]
        gates, condition, constant = _fused_gates(weights)
        self._gates, self._condition, self._constant = (part.astype(dtype) for part in (gates, condition, constant))
        self._output = _fused_output(weights).astype(dtype)
        # workspace of `advance`: nothing is allocated in a step but the action that it returns
        self._sums = np.zeros(4 * size, dtype)
        self._gate_pair, self._difference = np.zeros(2 * size, dtype), np.zeros(size, dtype)
        self._half = self._dtype.type(0.5)
        self._one = self._dtype.type(1.0)
        self._views = (
            self._sums[: 2 * size],
            self._sums[2 * size : 3 * size],
            self._sums[3 * size :],
            self._gate_pair[:size],
            self._gate_pair[size:],
        )

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], affines: Mapping[str, Any] | None = None, dtype: type = np.float32
    ) -> "NumpyDecoder":
        """From a state dict; see `decoder_weights`."""
        return cls(decoder_weights(state, affines), dtype)

    @classmethod
    def from_checkpoint(cls, path: str | Path, dtype: type = np.float32) -> "NumpyDecoder":
        """From a checkpoint of a tokenizer or of a policy that holds one. Imports torch.

        Raises:
            UserError: no such file, not readable, or no decoder in it.
        """
        return cls(_named(path, lambda: decoder_weights(_checkpoint_state(path))), dtype)

    @classmethod
    def load_npz(cls, path: str | Path, dtype: type = np.float32) -> "NumpyDecoder":
        """From a file that `save_npz` wrote. Needs no torch.

        Raises:
            UserError: no such file, or not one of ours.
        """
        return cls(_named(path, lambda: _read_npz(path)), dtype)

    def save_npz(self, path: str | Path) -> None:
        """Write the weights, float32 or as they were given, for `load_npz`."""
        arrays = asdict(self.weights)
        keys = np.array(arrays.pop("touch_keys"), dtype=np.str_)
        with open(path, "wb") as file:  # a name without .npz would get one otherwise
            np.savez(file, format=np.array(_FORMAT), touch_keys=keys, **arrays)

    def start(self, condition: Array) -> DecoderState:
        """See `FastDecoder`. Multiplies out the condition's part of the gates."""
        condition = np.asarray(condition, dtype=self._dtype)
        if condition.shape != (self.condition_dim,):
            raise UserError(f"condition: shape {condition.shape}, the decoder takes ({self.condition_dim},)")
        gates = self._gates.copy()
        gates[:, -1] = self._condition @ condition + self._constant
        inputs = np.zeros(gates.shape[1], self._dtype)
        inputs[-1] = 1
        return self._state(gates, inputs)

    def fork(self, state: DecoderState) -> DecoderState:
        """See `FastDecoder`."""
        return self._state(state.gates, state.inputs.copy())

    def advance(self, state: DecoderState, touch: Array) -> None:
        """See `FastDecoder`. One step of the GRU, with sigmoid(x) = (1 + tanh(x / 2)) / 2 multiplied into the gates."""
        pair_sums, new_sums, recurrent, reset, update = self._views
        hidden, difference = state.hidden, self._difference
        state.inputs[: self.touch_dim] = touch
        np.dot(state.gates, state.inputs, out=self._sums)
        np.tanh(pair_sums, out=self._gate_pair)
        np.multiply(recurrent, reset, out=recurrent)
        np.add(new_sums, recurrent, out=new_sums)
        new = np.tanh(new_sums, out=new_sums)
        np.subtract(hidden, new, out=difference)
        np.add(update, self._one, out=update)
        np.multiply(difference, update, out=difference)
        np.multiply(difference, self._half, out=difference)
        np.add(new, difference, out=hidden)

    def action(self, state: DecoderState) -> Array:
        """See `FastDecoder`."""
        return np.dot(self._output, state.output_inputs)

    def step(self, state: DecoderState, touch: Array) -> Array:
        """`advance`, then `action`: what the control loop does at every frame. Touch [F] to action [A]."""
        self.advance(state, touch)
        return np.dot(self._output, state.output_inputs)

    def decode(self, condition: Array, touch: Array) -> Array:
        """See `FastDecoder`."""
        state = self.start(condition)
        for frame in np.asarray(touch, dtype=self._dtype):
            self.advance(state, frame)
        return self.action(state)

    def decode_all(self, condition: Array, touch: Array, horizon: int | None = None) -> Array:
        """Actions [max(k, horizon), A] after each frame of touch [k, F].

        With a horizon the last frame is repeated up to it: what the slow policy meant, if touch stays as it is.
        """
        state = self.start(condition)
        touch = np.asarray(touch, dtype=self._dtype)
        more = max(0, (horizon or 0) - len(touch))
        return np.stack([self.step(state, frame) for frame in (*touch, *[touch[-1]] * more)])

    def _state(self, gates: Array, inputs: Array) -> DecoderState:
        return DecoderState(gates, inputs, inputs[self.touch_dim : -1], inputs[self.touch_dim :])


def _fused_gates(weights: DecoderWeights) -> tuple[Array, Array, Array]:
    """Gates [4H, F + H + 1], what the condition adds [4H, D] and the constant [4H], in float64.

    Blocks of rows: r / 2, z / 2, n's sum if r were 1/2, and half of n's recurrent part, by which
    n = tanh(third + tanh(r / 2) * fourth) with r / 2 short for the sum before the sigmoid, halved.
    """
    size, dims = weights.weight_hh.shape[1], weights.condition_dim
    w_ih, w_hh = weights.weight_ih.astype(np.float64), weights.weight_hh.astype(np.float64)
    w_condition, w_touch = w_ih[:, :dims], w_ih[:, dims:]
    # normalising x * scale + offset goes into weights and bias
    bias_ih = weights.bias_ih.astype(np.float64) + w_touch @ weights.touch_offset
    w_touch = w_touch * weights.touch_scale
    bias_hh = weights.bias_hh.astype(np.float64)
    pair, new = slice(0, 2 * size), slice(2 * size, 3 * size)

    def blocks(from_input: Array, from_hidden: Array) -> Array:
        half = from_hidden[new] / 2
        return np.concatenate([(from_input[pair] + from_hidden[pair]) / 2, from_input[new] + half, half])

    no = lambda array: np.zeros((3 * size, array.shape[1]))  # noqa: E731
    last_column = np.zeros((4 * size, 1))  # filled when a plan starts
    gates = np.concatenate([blocks(w_touch, no(w_touch)), blocks(no(w_hh), w_hh), last_column], axis=1)
    constant = blocks(bias_ih[:, None], bias_hh[:, None])[:, 0]
    return gates, blocks(w_condition, no(w_condition)), constant


def _fused_output(weights: DecoderWeights) -> Array:
    """[A, H + 1]: the linear layer and un-normalising (y - offset) / scale."""
    scale = weights.action_scale.astype(np.float64)
    constant = (weights.fc_bias - weights.action_offset.astype(np.float64)) / scale
    return np.concatenate([weights.fc_weight / scale[:, None], constant[:, None]], axis=1)


@dataclass(frozen=True)
class _Pair:
    scale: Any
    offset: Any


def _affines_in(state: Mapping[str, Any], prefix: str) -> dict[str, _Pair]:
    keys = [
        key.removeprefix(prefix).removesuffix(".scale")
        for key in state
        if key.startswith(prefix) and key.endswith(".scale")
    ]
    return {key: _Pair(state[f"{prefix}{key}.scale"], state[f"{prefix}{key}.offset"]) for key in keys}


def _array(value: Any) -> Array:
    if hasattr(value, "detach"):  # a tensor, without importing torch
        value = value.detach().cpu()
    return np.asarray(value)


def _checkpoint_state(path: str | Path) -> Mapping[str, Any]:
    import pickle

    import torch  # only here: the control loop does without

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"cannot be read as a checkpoint ({str(error).split('. ')[0]})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError("holds no state_dict; expected a checkpoint of a tokenizer or of a policy with one")
    return checkpoint["state_dict"]


def _read_npz(path: str | Path) -> DecoderWeights:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (ValueError, OSError, EOFError) as error:
        raise UserError("cannot be read; expected a file written by NumpyDecoder.save_npz") from error
    names: Sequence[str] = list(DecoderWeights.__dataclass_fields__)
    if missing := [name for name in ("format", *names) if name not in arrays]:
        raise UserError(f"lacks {missing}; expected a file written by NumpyDecoder.save_npz")
    if int(arrays["format"]) != _FORMAT:
        raise UserError(f"has format {arrays['format']}, this release reads {_FORMAT}: write it again")
    keys = tuple(str(key) for key in arrays["touch_keys"])
    return DecoderWeights(**{name: arrays[name] for name in names[:-1]}, touch_keys=keys)


def _named(path: str | Path, read: Callable[[], DecoderWeights]) -> DecoderWeights:
    """What `read` gives; its errors name the file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        return read()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
