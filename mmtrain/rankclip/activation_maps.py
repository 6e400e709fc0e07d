"""Where a dual encoder sees a word in a picture: Grad-CAM (arXiv 1610.02391) for the nouns of a caption (Figure 7).

Which method, layer and model Figure 7 shows was not found: these maps are our choice, as is the choice of words.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib
import open_clip
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from mmtrain.config_errors import UserError
from mmtrain.rankclip.networks import encode_images, encode_texts

# Words of captions that are seldom a thing to point at: function words, numbers, frequent adjectives and verbs.
_LISTED = """
    a an the this that these those some any each every both all another other others several many few more most much
    no not and or but nor so than then as if while when where which who whose whom what there here it its he him his
    she her hers they them their we us our you your i my me one's oneself himself herself itself themselves of in on at
    by to from with without within into onto over under above below beneath beside besides between among through across
    along around against behind before after during near next off out outside inside up upon down toward towards
    away about for like just very too also together apart only still top bottom front back side left right middle center
    is are was were be been being am do does did doing has have had having can could will would may might must should
    zero one two three four five six seven eight nine ten dozen first second third couple pair group bunch lots kind
    black white red green blue yellow orange brown purple pink grey gray golden silver dark light bright colorful
    big small large little tiny huge tall short long wide high low old new young good bad hot cold open full empty
    beautiful cute different various same sits sit sat stands stand stood holds hold held wears wear rides ride rode
    walks walk runs run lies lying lay lays eats eat plays play looks look shows show takes take going goes go gets get
    using use makes make made seen shown taken covered based flies fly swims jumps reads hangs watches flying tying
"""
_NO_NOUNS = frozenset(_LISTED.split())
_IN_ING = "building buildings ceiling clothing earring evening lightning morning painting railing spring string wedding"
_NOUNS_IN_ING = frozenset(_IN_ING.split())


def activation_maps(network: open_clip.CLIP, pictures: Tensor, tokens: Tensor) -> Tensor:
    """Grad-CAM of y = cos(picture, text), one map a pair (section 5.4, Figure 7).

        alpha_k = mean over positions of dy / dA_k,   map = ReLU(sum_k alpha_k A_k)

    with A the output of `layer4` (ModifiedResNet), or of `ln_1` of the last block at the patch tokens (ViT). The
    network is run as in evaluation and left as it was: modes, gradients, BatchNorm statistics, hooks. May be called
    under `no_grad`, `inference_mode` and autocast; it computes in the precision of the weights.

    Args:
        network: the dual encoder.
        pictures: uint8 [B, 3, H, W], of the size the network takes.
        tokens: int64 [B, context], one text for each picture.

    Returns:
        [B, H, W], scaled to [0, 1] for each picture by its smallest and largest value; a map without
        differences, above all one that ReLU sets to zero everywhere, is 0.

    Raises:
        UserError: a visual tower of another kind, or pictures or tokens of a wrong size.
    """
    full_precision = torch.autocast(pictures.device.type, enabled=False)  # in half, small gradients become 0
    with torch.inference_mode(False), full_precision, evaluating(network):  # inference mode records no graph
        with torch.no_grad():
            texts = encode_texts(network, tokens)
        with torch.enable_grad(), watched(_layer(network.visual)) as seen:
            cosine = (encode_images(network, pictures) * texts).sum()
            (gradient,) = torch.autograd.grad(cosine, seen[0])
        weights = _as_grid(network.visual, gradient).mean(dim=(2, 3), keepdim=True)
        maps = F.relu((weights * _as_grid(network.visual, seen[0].detach())).sum(dim=1, keepdim=True))
        return _scaled(F.interpolate(maps, size=pictures.shape[-2:], mode="bilinear").squeeze(1))


def _layer(visual: nn.Module) -> nn.Module:
    """The module whose output is looked at."""
    if isinstance(visual, ModifiedResNet):
        return visual.layer4
    if isinstance(visual, VisionTransformer):
        return visual.transformer.resblocks[-1].ln_1
    raise UserError(
        f"architecture: activation maps need a ModifiedResNet or VisionTransformer as visual tower, not a "
        f"{type(visual).__name__}; the published models are ViT-B-32-quickgelu and RN50-quickgelu"
    )


def _as_grid(visual: nn.Module, activation: Tensor) -> Tensor:
    """[B, K, rows, columns] of what `_layer` gives; a ViT gives [B, 1 + rows * columns, K], the class token first."""
    if isinstance(visual, ModifiedResNet):
        return activation
    return activation[:, 1:].transpose(1, 2).unflatten(2, visual.grid_size)


def _scaled(maps: Tensor) -> Tensor:
    """Each map of [B, H, W] to [0, 1]."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0.0)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards each module has its own mode again."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def watched(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the outputs of a layer, cut from the graph before it: frozen parameters do not matter."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = layer.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def overlay(picture: Tensor, activation_map: Tensor, opacity: float = 0.5) -> Tensor:
    """A map laid over its picture in matplotlib's jet, as Figure 7 has it: blue is 0, red is 1.

    Args:
        picture: uint8 [3, H, W].
        activation_map: [H, W] in [0, 1].
        opacity: share of the colour map, in [0, 1].

    Returns:
        uint8 [3, H, W].
    """
    colours = matplotlib.colormaps["jet"](activation_map.detach().cpu().float().numpy())[..., :3]
    colours = torch.from_numpy(colours).permute(2, 0, 1) * 255
    return (opacity * colours + (1 - opacity) * picture.cpu()).round().to(torch.uint8)


def nouns(caption: str, given: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """The words of an English caption to make maps for, in order, each once.

    A heuristic, no tagger: captions are cut at listed words (function words, numbers, colours, frequent adjectives and
    verbs), at punctuation, and at words in -ing and -ed; what remains between two cuts is taken as one noun, of long
    ones the last two words. Unlisted verbs and adjectives stay in. What matters should be given by hand.

    Args:
        caption: the caption.
        given: nouns by caption, which replace the heuristic there.

    Example:
        >>> nouns("An airport filled with planes sitting on tarmacs")
        ['airport', 'planes', 'tarmacs']
        >>> nouns("A red fire hydrant, next to a dog.")
        ['fire hydrant', 'dog']
        >>> nouns("two men on motorcycles", given={"two men on motorcycles": ["man", "motorcycles"]})
        ['man', 'motorcycles']
    """
    if given and caption in given:
        return list(given[caption])
    words = re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\S", caption.lower())
    kept = " ".join(word if _may_be_noun(word) else "," for word in words)
    chunks = [chunk.split()[-2:] for chunk in kept.split(",")]
    return list(dict.fromkeys(" ".join(chunk) for chunk in chunks if chunk))


def _may_be_noun(word: str) -> bool:
    if len(word) < 2 or word in _NO_NOUNS:
        return False
    return word in _NOUNS_IN_ING or len(word) < 6 or not word.endswith(("ing", "ed"))
