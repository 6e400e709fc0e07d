"""RDP's Tables II, III and IV in simulation: the rows of each task, three seeds, judged by the paper's orderings.

The numbers of a simulation stand for no robot: only which method is above which can be compared. Every cell has 50
episodes a seed, with the same seeds of the world for every method. A claim is judged twice: by the paired differences
of the training seeds, and by the intervals of all their episodes.
"""

from mmtrain.plans import Claim, Method, Plan, Training
from mmtrain.rdp.records import CELLS, episode_values

OWN = "RDP (Force)"
DP, IMAGE, EMBEDDING = "DP", "DP w. tactile img.", "DP w. tactile emb."
DEMONSTRATIONS, PICTURES = "demonstrations", "demonstrations_pictures"
QUICK = (
    *("--trainer.max_steps", "20", "--trainer.check_val_every_n_epoch", "1", "--trainer.log_every_n_steps", "5"),
    *("--data.demonstrations.init_args.episodes", "4", "--data.episodes", "1", "--data.val_ratio", "0.25"),
)
NOTE = (
    "Measured in simulation: only the order of the methods can be compared with the paper, whose numbers are from real "
    "robots."
)
LIFT_CELLS = [f"{cup}_{value}" for cup in CELLS["lift"].values() for value in ("clamp", "lift", "score")]


def data(name: str) -> tuple[str, ...]:
    """Options that put the shared demonstrations into the folder of all runs."""
    return ("--vars.data", f"{{out}}/{name}.zarr")


def dp(config: str, needs: str = DEMONSTRATIONS) -> Method:
    """A Diffusion Policy."""
    return Method(config, words=data(needs), needs=needs)


def rdp(name: str) -> Method:
    """An RDP: its tokenizer, then the policy that holds it. `name` is what follows `rdp_at_` and `rdp_ldp_`."""
    tokenizer = Training("tokenizer", f"rdp_at_{name}", "--vars.tokenizer")
    return Method(f"rdp_ldp_{name}", (tokenizer,), data(DEMONSTRATIONS), DEMONSTRATIONS)


def claims(task: str, table: str, cells: list[str], rivals: tuple[str, ...]) -> tuple[Claim, ...]:
    """RDP (Force) is above every Diffusion Policy in every cell."""
    return tuple(Claim(f"above DP: {cell.replace('_', ' ')}", table, f"test/{task}/{cell}", rivals) for cell in cells)


def plan(task: str, table: str, methods: dict[str, Method], cells: list[str], more: tuple[Claim, ...] = ()) -> Plan:
    """What one task runs."""
    rivals = tuple(name for name in methods if name.startswith("DP"))
    prepared = {DEMONSTRATIONS: Method(f"rdp_at_{task}_sim", words=data(DEMONSTRATIONS))}
    if any(method.needs == PICTURES for method in methods.values()):
        prepared[PICTURES] = Method(methods[IMAGE].config, words=data(PICTURES))
    return Plan(
        paper="rdp",
        own_method=OWN,
        methods=methods,
        words=("--vars.checkpoint_steps", "500"),
        epochs=None,
        seeds=(3, 1),
        claims=(*claims(task, table, cells, rivals), *more),
        shown=tuple(f"test/{task}/{name}" for name in ("stable_force", "peak_force", "stopped_for_force")),
        quick_words=QUICK,
        prepared=prepared,
        episodes=episode_values,
        title=f"{OWN} and its rivals, {task}, in simulation ({table} of the paper)",
        note=NOTE,
    )


PERTURBATIONS = [*CELLS["wipe"].values(), "all"]
PLANS = {
    "wipe": plan(
        "wipe",
        "Table III",
        {
            DP: dp("dp_wipe_sim"),
            EMBEDDING: dp("dp_tactile_emb_wipe_sim"),
            "RDP (GelSight)": rdp("wipe_gelsight_sim"),
            OWN: rdp("wipe_sim"),
        },
        PERTURBATIONS,
    ),
    "peel": plan(
        "peel",
        "Table II",
        {
            DP: dp("dp_peel_sim"),
            IMAGE: dp("dp_tactile_img_peel_sim", PICTURES),
            EMBEDDING: dp("dp_tactile_emb_peel_sim"),
            "RDP (GelSight)": rdp("peel_gelsight_sim"),
            "RDP (MCTac)": rdp("peel_mctac_sim"),
            OWN: rdp("peel_sim"),
        },
        PERTURBATIONS,
    ),
    "lift": plan(
        "lift",
        "Table IV",
        {
            DP: dp("dp_lift_sim"),
            EMBEDDING: dp("dp_tactile_emb_lift_sim"),
            "RDP (GelSight + MCTac)": rdp("lift_tactile_sim"),
            OWN: rdp("lift_sim"),
        },
        [*LIFT_CELLS, "all_score"],
        (Claim("touch helps DP", "Table IV", "test/lift/all_score", (DP,), own=EMBEDDING),),
    ),
}
