"""LoRA adapters of peft on a UNet and a text encoder: adding, naming and activating them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmtrain.config_errors import UserError

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the linears of every attention
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
DEFAULT = "default"  # of a model with one adapter


@dataclass
class LoraSettings:
    """Which low-rank updates are trained (arXiv 2106.09685).

    Args:
        rank: of each update.
        alpha: an update is scaled by alpha / rank; the rank where none is given, so by 1.
        text_encoder: whether the attention of the text encoder gets an adapter too.
        dropout: on the input of an update, in [0, 1).
    """

    rank: int = 4
    alpha: float | None = None
    text_encoder: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or (self.alpha is not None and self.alpha <= 0):
            raise UserError(
                f"lora: rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}: rank must be at least 1, alpha "
                "above 0, dropout in [0, 1)"
            )


def adapter_name(character: str) -> str:
    """A character's weights are called by its name; a dot would divide the names of tensors, so it becomes "_".

    Raises:
        UserError: a name that torch uses itself.

    >>> adapter_name("Mr. Bean")
    'Mr_ Bean'
    """
    if hasattr(nn.ModuleDict, character):
        raise UserError(f"character {character!r}: torch does not allow this name, rename the character")
    return character.replace(".", "_")


def add_adapters(networks: Mapping[str, nn.Module], settings: LoraSettings, name: str = DEFAULT) -> None:
    """Add one trainable adapter to each network, and freeze all that is not an adapter.

    Gaussian A and zero B: the first output is the base model's.

    Args:
        networks: "unet" and, where its attention is trained too, "text_encoder".

    Raises:
        UserError: a network has no attention of the expected names, or the adapter's name cannot be one.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for kind, network in networks.items():
        targets = UNET_TARGETS if kind == "unet" else TEXT_TARGETS
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha or settings.rank,
            init_lora_weights="gaussian",
            target_modules=list(targets),
            lora_dropout=settings.dropout,
        )
        try:
            # not `network.add_adapter`: transformers' refuses releases of peft that can do this
            inject_adapter_in_model(config, network, name)
        except (ValueError, KeyError) as error:
            raise UserError(f"lora: no adapter {name!r} can be added to the {kind}: {error}") from error
        for layer in lora_layers(network):
            train_all(layer)


def lora_layers(network: nn.Module) -> list[Any]:
    """The layers that hold adapters, in the network's order."""
    from peft.tuners.lora import LoraLayer

    return [module for module in network.modules() if isinstance(module, LoraLayer)]


def activate(networks: Mapping[str, nn.Module], weights: Mapping[str, float]) -> None:
    """Let exactly these adapters act, each times its weight; all of them stay trainable.

    Args:
        weights: adapter -> factor of its update; none for the base model.
    """
    for network in networks.values():
        for layer in lora_layers(network):
            layer.set_adapter(list(weights))
            for name, weight in weights.items():
                layer.set_scale(name, weight)
            train_all(layer)


def train_all(layer: Any) -> None:
    """peft freezes what is not active, which would take it from the optimizer's, the average's and DDP's sight."""
    for part in layer.adapter_layer_names:
        for adapter in getattr(layer, part).values():
            adapter.requires_grad_(True)


def adapters_of(network: nn.Module) -> list[str]:
    """Names of the adapters of a network, in the order in which they were added."""
    names: dict[str, None] = {}
    for layer in lora_layers(network):
        names.update(dict.fromkeys(layer.lora_A))
    return list(names)


def average(names: Sequence[str]) -> dict[str, float]:
    """Equal weights whose sum is 1: the mean of the updates of several adapters.

    >>> average(["Eddy", "Harry"])
    {'Eddy': 0.5, 'Harry': 0.5}
    """
    return {adapter_name(name): 1 / len(names) for name in names}
