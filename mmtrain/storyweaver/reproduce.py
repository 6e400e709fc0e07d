"""StoryWeaver's table on the creatures' world, from scratch: one base model, customised in four ways, three seeds.

The base row is the model before any customisation. LoRA and DreamBooth have weights for each character, so they draw
stories of one character, as in the paper. Seeds are of training and of sampling.
"""

from mmtrain.plans import Claim, Method, Plan
from mmtrain.storyweaver.records import picture_values

OWN, PLAIN = "StoryWeaver", "StoryWeaver (no guidance)"
BASE, LORA, DREAMBOOTH = "Base model", "LoRA", "DreamBooth"
SINGLE, MULTI = "test/creatures_single", "test/creatures_multi"
LAST = "{out}/NAME/checkpoints/last.ckpt"
JUDGES = {"clip": "clip_creatures", "recogniser": "recogniser_standin"}
UNGUIDED = ("--model.guidance", "null")
SEEDED = ("--model.test.skip_seeds", "{seed}")
QUICK = (
    *("--trainer.max_steps", "4", "--trainer.check_val_every_n_epoch", "1", "--trainer.log_every_n_steps", "1"),
    *("--vars.lines", "6", "--vars.steps", "4", "--vars.per_class", "2", "--vars.min_accuracy", "0"),
)


def row(config: str, *words: str, checkpoint: str | None = None) -> Method:
    """A row of the table."""
    return Method(config, words=(*SEEDED, *words), checkpoint=checkpoint)


PLAN = Plan(
    paper="storyweaver",
    own_method=OWN,
    methods={
        BASE: row("storyweaver_standin", *UNGUIDED, "--model.method", BASE, checkpoint="null"),
        LORA: row("lora_standin"),
        DREAMBOOTH: row("dreambooth_standin"),
        PLAIN: row("storyweaver_standin", *UNGUIDED, "--model.method", PLAIN),
        OWN: row("storyweaver_standin"),
    },
    words=(
        *("--vars.data", "{out}/creatures", "--vars.checkpoint_steps", "200"),
        *("--vars.base", "{out}/base/pipeline", "--vars.pairs", "{out}/pairs", "--vars.text_pairs", "{out}/text_pairs"),
        *(word for name in ("clip", "text", "recogniser") for word in (f"--vars.{name}", LAST.replace("NAME", name))),
    ),
    epochs=None,
    seeds=(3, 1),
    claims=(
        Claim("single characters look like themselves", "Table 1", f"{SINGLE}/dino_i", (LORA, DREAMBOOTH)),
        Claim("single characters look like themselves (CLIP)", "Table 1", f"{SINGLE}/clip_i", (LORA, DREAMBOOTH)),
        Claim("single pictures follow the text", "Table 1", f"{SINGLE}/clip_t", (LORA, DREAMBOOTH)),
        Claim("customising brings the characters", "ours", f"{SINGLE}/f_acc", (BASE,), own=PLAIN),
        Claim("guidance draws the right pairs", "paper, ablation not printed", f"{MULTI}/f_acc_two", (PLAIN,)),
        Claim("guidance draws the right characters", "paper, ablation not printed", f"{MULTI}/c_f1", (PLAIN,)),
        Claim("guidance keeps the order", "ours", f"{MULTI}/order_kept", (PLAIN,)),
        Claim("guidance costs no text", "ours", f"{MULTI}/clip_t", (PLAIN,)),
    ),
    shown=(
        *(f"{SINGLE}/{name}" for name in ("f_acc", "c_f1", "clip_t_full")),
        *(f"{MULTI}/{name}" for name in ("f_acc", "c_f1_macro", "clip_t_full")),
    ),
    quick_words=QUICK,
    shared=(
        {name: Method(config) for name, config in JUDGES.items()} | {"text": Method("clip_text_creatures")},
        {"base": Method("storyweaver_standin_base")},
    ),
    episodes=picture_values,
    title="StoryWeaver on the creatures' world",
    note="Laptop scale, drawn creatures, never to be read as the paper's numbers.",
)
