"""Diff-Foley's main table on simulated impacts, from scratch: every network is trained once, sampling has three seeds.

Ground truth and random audio are no rows of the paper; they show what the evaluators say of perfect and of unrelated
sound. The rows share one diffusion model, so that they differ in guidance alone; the last one is the same network
trained with rectified flow and sampled in few steps.
"""

from mmtrain.difffoley.records import clip_values
from mmtrain.plans import Claim, Method, Plan

OWN = "Diff-Foley (double guidance)"
CFG, PLAIN, FLOW = "Diff-Foley (CFG)", "Diff-Foley (no guidance)", "Diff-Foley (CFG, flow 5 steps)"
REAL, RANDOM = "Ground truth", "Random audio"
LAST = "{out}/NAME/checkpoints/last.ckpt"
MADE = {
    "cavp": "cavp",
    "first_stage": "vae",
    "guidance_classifier": "align_guidance",
    "alignment_classifier": "align_metric",
    "feature_network": "sounds",
}
QUICK = (
    *("--trainer.max_steps", "4", "--trainer.check_val_every_n_epoch", "1", "--trainer.log_every_n_steps", "1"),
    *("--data.maker.init_args.splits", "{train: 64, val: 16, test: 16}"),
)


def trained(name: str) -> Method:
    """A training that all rows share."""
    return Method(f"difffoley_{name}_impacts")


def row(*words: str, model: str = "ldm") -> Method:
    """A row of the table: `test` of a trained diffusion model."""
    seeded = ("--model.test.sampling_seed", "{seed}", *words)
    return Method(f"difffoley_{model}_impacts", words=seeded, needs="data", checkpoint=LAST.replace("NAME", model))


PLAN = Plan(
    paper="difffoley",
    own_method=OWN,
    methods={
        PLAIN: row("--model.guidance.scale", "1"),
        CFG: row(),
        OWN: row("-c", "double_guidance_impacts"),
        FLOW: row(model="ldm_flow"),
        REAL: row("--model.test.audio", "ground_truth"),
        RANDOM: row("--model.test.audio", "random"),
    },
    words=(
        *("--vars.data", "{out}/impacts", "--vars.checkpoint_steps", "200"),
        *(word for key, name in MADE.items() for word in (f"--vars.{key}", LAST.replace("NAME", name))),
    ),
    epochs=None,
    seeds=(3, 1),
    claims=(
        Claim("the classifier's guidance aligns better", "main table", "test/impacts/align_acc", (CFG,)),
        Claim("the classifier's guidance puts onsets better", "main table", "test/impacts/onset_f1", (CFG,)),
        Claim("better inception score", "main table", "test/impacts/inception_score", (CFG,)),
        Claim("lower FID", "main table", "test/impacts/fid", (CFG,), "lower"),
        Claim("guidance aligns better", "ours", "test/impacts/align_acc", (PLAIN,), own=CFG),
        Claim("guidance puts onsets better", "ours", "test/impacts/onset_f1", (PLAIN,), own=CFG),
        Claim("guidance gives a better inception score", "ours", "test/impacts/inception_score", (PLAIN,), own=CFG),
        Claim("onsets are no guesses", "ours", "test/impacts/onset_f1", (RANDOM,), own=PLAIN),
        Claim("few steps of flow lose no onsets", "ours", "test/impacts/onset_f1", (CFG,), own=FLOW),
    ),
    shown=(
        "test/impacts/kl",
        "test/impacts/onset_offset",
        "test/impacts/align_acc_real",
        "test/impacts/align_acc_shifted",
        "test/impacts/align_acc_wrong",
        "test/impacts/seconds_per_clip",
    ),
    quick_words=QUICK,
    prepared={"data": Method("difffoley_sounds_impacts")},
    shared=(
        {name: trained(name) for name in ("cavp", "vae", "sounds")},
        {name: trained(name) for name in ("ldm", "ldm_flow", "align_guidance", "align_metric")},
    ),
    episodes=clip_values,
    title="Diff-Foley on simulated impacts",
    note="Laptop scale, a simulated world, never to be read as the paper's numbers; seeds are of sampling.",
)
