"""The memory that `plan` predicts from steps of 2 and 4 samples, beside what a process really takes at a larger batch.

Resident memory of three steps of one small configuration a paper, in a process of its own each; prints a ratio.
Usage: python -m tests.benchmarks.memory_plan
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from mmtrain.config_layers import split_arguments
from mmtrain.footprint import MIB, measure, run_few, watched_resident_bytes
from tests.small_trainings import write_training

VIT = {"image_size": 64, "layers": 6, "width": 256, "head_width": 64, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 2}
# each tensor goes back to the system when it is freed, so that resident memory is not that of glibc's fragments
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
REFERENCE = ["--model.preset", "reference"]
# training of tests.small_trainings -> batch, and settings that make it large enough to be seen
CASES: dict[str, tuple[int, list[str]]] = {
    "rankclip": (64, ["--data.pictures.size", "64"]),
    "ldm": (32, ["--model.network.block_out_channels", "[128, 128]"]),
    "latent_policy": (32, ["--model.class_path", "mmtrain.rdp.dp.DiffusionPolicy", "--data.method", "dp", *REFERENCE]),
    "storyweaver": (16, ["--data.picture_size", "[128, 224]"]),
}


def one(name: str, folder: Path) -> dict[str, float]:
    """Predicted and measured bytes that a training adds to its process."""
    batch, changes = CASES[name]
    config = write_training(folder, name)
    if name == "rankclip":
        clip = {"embed_dim": 256, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT}
        (folder / "small_vit.json").write_text(json.dumps(clip))
    words = split_arguments(["-c", str(config), *changes])
    run_few(*words, 2, folder / "warm")  # what libraries keep for themselves is there before
    with watched_resident_bytes() as grown:
        run_few(*words, batch, folder / "measured")
    return {"batch": batch, "predicted": measure(*words).peak(batch), "measured": grown[0]}


def compare(name: str) -> dict[str, float]:
    """`one` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.benchmarks.memory_plan", name, folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ | RETURNED)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        print(json.dumps(one(sys.argv[1], Path(sys.argv[2]))))
        sys.exit()
    for case in CASES:
        found = compare(case)
        ratio = found["predicted"] / found["measured"]
        sizes = f"predicted {found['predicted'] / MIB:.0f} MiB, measured {found['measured'] / MIB:.0f} MiB"
        print(f"{case}, batch {found['batch']}: {sizes}, ratio {ratio:.2f}", flush=True)
