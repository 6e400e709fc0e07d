"""The verb `export`: write a checkpoint in the layout that its paper released. What is in it decides which."""

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any, NoReturn

from mmtrain.config_errors import UserError

NAMES = {"rdp": "RDP", "difffoley": "Diff-Foley", "storyweaver": "StoryWeaver"}
DESCRIPTION = """Write a checkpoint in a released layout. What it holds decides which:
  RankCLIP and other CLIP models   a file that open_clip.create_model loads
  RDP tokenizer or policy, DP      the layout of the released RDP checkpoints (weights and normalisers)
  Diff-Foley CAVP, diffusion       the layout of the released Diff-Foley checkpoints (averaged weights, if there are
  model, alignment classifiers     any); what the released networks do not have is refused
  StoryWeaver, LoRA, DreamBooth    a folder that diffusers opens as a StableDiffusionPipeline (averaged weights, if
                                   there are any), LoRA files beside it"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"mmtrain export: {message}")


def parser() -> argparse.ArgumentParser:
    """The command line of all papers together."""
    lines = _Parser("mmtrain export", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines.add_argument("checkpoint", metavar="CHECKPOINT", help="for example runs/NAME/checkpoints/last.ckpt")
    lines.add_argument("out", metavar="OUT", help="file to write; a new folder for StoryWeaver")
    lines.add_argument("--architecture", help="CLIP: open_clip name; else the stored one, else guessed from the shapes")
    lines.add_argument("--tokenizer", metavar="OUT", help="RDP's latent policy: write its tokenizer too, to this file")
    lines.add_argument("--pipeline", metavar="FOLDER", help="StoryWeaver: where the model is that it was trained on")
    lines.add_argument("--unmerged", action="store_true", help="StoryWeaver: leave the LoRA out of the UNet")
    return lines


def room(checkpoint: str | Path) -> str:
    """The paper whose code exports a checkpoint: the room that its model is of, "rankclip" if it does not tell.

    A file that cannot be read here goes to "rankclip", which knows more formats and says what is wrong.
    """
    content = _peek(checkpoint)
    if not isinstance(content, dict):
        return "rankclip"
    settings = content.get("settings")
    stored = settings.get("model.class", "") if isinstance(settings, dict) else ""
    stored = str(content.get("model_class") or stored)  # rooms may name the class themselves
    for paper in ("difffoley", "storyweaver"):
        if stored.startswith(f"mmtrain.{paper}."):
            return paper
    return "rdp" if stored.startswith("mmtrain.rdp.") or "state_dicts" in content else "rankclip"


def _peek(checkpoint: str | Path) -> Any:
    import torch  # not above, so that a mistake on the command line is answered at once

    if not Path(checkpoint).is_file() or not zipfile.is_zipfile(checkpoint):
        return None
    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError):
        return None


def main(argv: list[str]) -> int:
    """Run `mmtrain export CHECKPOINT OUT [...]`.

    Raises:
        UserError: a mistake on the command line, or a checkpoint that cannot be exported.
    """
    options = parser().parse_args(argv)
    paper = room(options.checkpoint)
    if options.tokenizer and paper != "rdp":
        raise UserError(f"--tokenizer: {options.checkpoint} is no policy of RDP")
    if options.architecture and paper != "rankclip":
        raise UserError(f"--architecture: is for CLIP models, {options.checkpoint} is one of {NAMES[paper]}")
    if (options.pipeline or options.unmerged) and paper != "storyweaver":
        option = "--pipeline" if options.pipeline else "--unmerged"
        raise UserError(f"{option}: {options.checkpoint} is no model of StoryWeaver's room")
    if paper == "rankclip":
        from mmtrain.rankclip.pretrained import main as export_clip

        named = ["--architecture", options.architecture] if options.architecture else []
        return export_clip([options.checkpoint, options.out, *named])
    if paper == "difffoley":
        from mmtrain.difffoley.pretrained import export as export_foley

        done = export_foley(options.checkpoint, options.out)
    elif paper == "storyweaver":
        from mmtrain.storyweaver.exporting import export as export_story

        done = export_story(options.checkpoint, options.out, options.pipeline, not options.unmerged)
    else:
        from mmtrain.rdp.pretrained import export

        done = export(options.checkpoint, options.out, options.tokenizer)
    print(f"wrote         {options.out}" + (f" and {options.tokenizer}" if options.tokenizer else ""))
    print(f"kind          {done['kind']}")
    print(f"keys          {done['keys']}")
    print(f"parameters    {done['parameters']:,}")
    print(f"source sha256 {done['sha256']}")
    return 0
