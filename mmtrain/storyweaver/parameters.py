"""How many parameters a method needs for a world of stories: the column "# Params/DB" (arXiv 2412.07375, Table 1).

The printed column counts the base model without the autoencoder's decoder, in 10^6, and what a method adds in 2^20,
rounded down: it mixes units. Nothing of this explains the 1425 printed for LoRA-Composer.
"""

from dataclasses import dataclass
from typing import Literal

from mmtrain.config_errors import UserError, nearest

UNET, TEXT_ENCODER = 859_520_964, 123_060_480  # Stable Diffusion 1.5, counted
VAE_ENCODER, VAE_DECODER = 34_163_664, 49_490_199  # each with its 1x1 convolution at the latents
KNOWLEDGE_ENCODER = 98_948
MEAN_CHARACTERS = 7  # of the two worlds of TBC-Bench, 9 and 5
BASE = UNET + TEXT_ENCODER + VAE_ENCODER

Unit = float | Literal["paper"]


@dataclass(frozen=True)
class Extra:
    """What a method has beside the base model.

    Args:
        once: parameters for a world.
        each: parameters for each character.
        copies: whether each character has a whole model of its own instead.
    """

    once: int = 0
    each: int = 0
    copies: bool = False


METHODS = {
    "StoryWeaver": Extra(once=KNOWLEDGE_ENCODER),
    "DreamBooth": Extra(copies=True),
    "LoRA": Extra(each=797_184 + 294_912),  # rank 4 on all attention of UNet and text encoder
    "IP-Adapter(base)": Extra(once=22_319_616),
    "IP-Adapter(plus)": Extra(once=49_087_488),
    "StoryGEN": Extra(once=49_599_040),  # attention to earlier pictures, with its norm
    "Mix-of-Show": Extra(once=77_369_280 + 77_000_640),  # both T2I-Adapters
}


def params_per_world(method: str, n_characters: int, count_decoder: bool = False, unit: Unit = 1e6) -> float:
    """Parameters that the stories of one world need.

    Args:
        method: of Table 1, see `METHODS`.
        n_characters: of the world.
        count_decoder: count the autoencoder's decoder too, without which there are no pictures.
        unit: what to count in, 1e6 for millions; "paper" counts as the paper does, to whole numbers.

    Returns:
        The number in that unit; with "paper" a whole number.

    Raises:
        UserError: no such method, no characters, or no such unit.

    >>> round(params_per_world("LoRA", 7), 2), params_per_world("LoRA", 7, unit="paper")
    (1024.39, 1024)
    """
    if method not in METHODS:
        hint = f"; did you mean {near}?" if (near := nearest(method, METHODS)) else f", expected {', '.join(METHODS)}"
        raise UserError(f"method: {method!r} has no count of parameters{hint}")
    if n_characters < 1:
        raise UserError(f"n_characters: {n_characters}, must be at least 1")
    extra, base = METHODS[method], BASE + (VAE_DECODER if count_decoder else 0)
    copies = n_characters if extra.copies else 1
    added = extra.once + n_characters * extra.each
    if unit == "paper":
        return round(copies * (base + KNOWLEDGE_ENCODER) / 1e6) + int(added / 2**20)  # every base counts one
    if isinstance(unit, str) or unit <= 0:
        raise UserError(f"unit: {unit!r}, expected a number above 0, or paper")
    return (copies * base + added) / unit


def describe_count(method: str, n_characters: int) -> str:
    """The honest count beside the one in the paper's units.

    >>> describe_count("IP-Adapter(base)", 7)
    '1039.1 x 10^6 (1038 as the paper counts; 1088.6 x 10^6 with the decoder)'
    """
    honest, paper = params_per_world(method, n_characters), params_per_world(method, n_characters, unit="paper")
    whole = params_per_world(method, n_characters, count_decoder=True)
    return f"{honest:.1f} x 10^6 ({paper} as the paper counts; {whole:.1f} x 10^6 with the decoder)"
