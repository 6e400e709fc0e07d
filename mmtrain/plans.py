"""What a reproduction runs: a paper's methods, the trainings they need, the claims, and the command of each stage."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

STAGES = ("fit", "test")
LAST = Path("checkpoints", "last.ckpt")


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, as something to be measured: a method is better than each rival in a metric.

    `own` is that method; None: the plan's own method.
    """

    text: str
    source: str
    metric: str
    rivals: tuple[str, ...]
    direction: Literal["higher", "lower"] = "higher"
    own: str | None = None


@dataclass(frozen=True)
class Training:
    """A training that a method needs before its own `fit`, in the subfolder `name` of the run's folder.

    `option` is the one of the method's config that takes the checkpoint.
    """

    name: str
    config: str
    option: str


@dataclass(frozen=True)
class Method:
    """What makes a method: its config, the trainings before, in their order, and options of all its stages.

    `needs` is the name of the shared data that it uses, one of `Plan.prepared`. With a `checkpoint`, such as that of a
    training of `Plan.shared`, nothing is trained for it: only `test` runs.
    """

    config: str
    before: tuple[Training, ...] = ()
    words: tuple[str, ...] = ()
    needs: str | None = None
    checkpoint: str | None = None


@dataclass(frozen=True)
class Plan:
    """What a paper's reproduction runs.

    Args:
        own_method: as the paper spells it, like the keys of `methods`.
        methods: method -> config, or more where that is not all.
        words: options of every run, after the config. `{out}` in them, as in a method's, is the folder of all runs,
            `{seed}` the run's seed.
        epochs, seeds: of the whole and of the quick reproduction; no epochs: the configs' own lengths.
        claims: what is judged.
        shown: metrics that are reported without a claim.
        quick_words: options of the quick reproduction.
        prepared: name -> a training by whose config the shared data are made, once, before all runs.
        shared: trainings that methods have in common, done once with seed 0, in groups: those of a group may run side
            by side, the next group may need them. Each is in the folder of its name.
        episodes: gives the values in [0, 1] of a run folder behind a metric, or None if it has none; where it has,
            claims are judged by the values of all seeds together as well.
        title, note: what the result is called, and what must be said of it.
    """

    paper: str
    own_method: str
    methods: dict[str, str | Method]
    words: tuple[str, ...]
    epochs: tuple[int, int] | None
    seeds: tuple[int, int]
    claims: tuple[Claim, ...]
    shown: tuple[str, ...] = ()
    quick_words: tuple[str, ...] = ()
    prepared: dict[str, Method] = field(default_factory=dict)
    shared: tuple[dict[str, Method], ...] = ()
    episodes: Callable[[Path, str], list[float] | None] | None = None
    title: str | None = None
    note: str = "Laptop scale, never to be read as the paper's numbers."

    def method(self, name: str) -> Method:
        """A method, also where only its config is given."""
        entry = self.methods[name]
        return entry if isinstance(entry, Method) else Method(entry)

    def only(self, names: Sequence[str]) -> "Plan":
        """The plan of some of its methods, with the claims that are about two of them; other names are passed over.

        Of the shared trainings those stay whose folder a chosen method or the plan's words name.
        """
        claims = [replace(c, rivals=tuple(r for r in c.rivals if r in names)) for c in self.claims]
        kept = tuple(claim for claim in claims if claim.rivals and (claim.own or self.own_method) in names)
        methods = {name: entry for name, entry in self.methods.items() if name in names}
        chosen = [self.method(name) for name in methods]
        needs = {method.needs for method in chosen}
        used = " ".join((*self.words, *(word for m in chosen for word in (*m.words, m.checkpoint or ""))))
        return replace(
            self,
            methods=methods,
            shared=tuple({n: m for n, m in group.items() if f"{{out}}/{n}/" in used} for group in self.shared),
            prepared={name: entry for name, entry in self.prepared.items() if name in needs},
            claims=kept,
            shown=tuple(dict.fromkeys([*(claim.metric for claim in self.claims), *self.shown])),
        )


@dataclass(frozen=True)
class Job:
    """One method with one seed."""

    method: str
    config: str
    seed: int
    folder: Path
    words: tuple[str, ...]
    before: tuple[Training, ...] = ()
    last_stages: tuple[str, ...] = STAGES
    checkpoint: str = "last"

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of all that is to be done, in their order."""
        return (*(training.name for training in self.before), *self.last_stages)

    def command(self, stage: str) -> list[str]:
        """The words after `python -m mmtrain` of one of `stages`; all stages have the same settings."""
        training = next((training for training in self.before if training.name == stage), None)
        if training:
            verb, config, folder, name = "fit", training.config, self.folder / stage, f"{self.folder.name}-{stage}"
            made: list[str] = []
        else:
            verb, config, folder, name = stage, self.config, self.folder, self.folder.name
            made = [word for part in self.before for word in (part.option, str(folder / part.name / LAST))]
        own = ["--seed_everything", str(self.seed), "--data.seed", str(self.seed), "--vars.name", name]
        place = ["--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false"]
        return [verb, "-c", config, *self.words, *made, *own, *place, "--ckpt_path", self.checkpoint]


def jobs(plan: Plan, out: Path, quick: bool) -> list[Job]:
    """All runs, seed by seed, so that after each seed the methods can be compared."""
    words = common_words(plan, quick)
    found = []
    for seed in range(plan.seeds[quick]):
        for name in plan.methods:
            method = plan.method(name)
            folder = out / f"{plain_name(name)}-seed{seed}"
            own = filled((*words, *method.words), out, seed)
            if method.checkpoint is None:
                found.append(Job(name, method.config, seed, folder, own, method.before))
            else:
                (checkpoint,) = filled((method.checkpoint,), out, seed)
                found.append(Job(name, method.config, seed, folder, own, (), ("test",), checkpoint))
    return found


def preparations(plan: Plan, out: Path, quick: bool) -> list[Job]:
    """What makes the data that all runs share: trainings of no length, as `fit` makes data that are missing."""
    found = []
    for name, entry in plan.prepared.items():
        words = filled((*common_words(plan, quick), *entry.words, "--trainer.max_epochs", "0"), out, 0)
        found.append(Job(name, entry.config, 0, out / name, words, last_stages=("fit",)))
    return found


def shared_trainings(plan: Plan, out: Path, quick: bool) -> list[list[Job]]:
    """The trainings of `Plan.shared`, group by group."""
    return [
        [
            Job(
                name, entry.config, 0, out / name,
                filled((*common_words(plan, quick), *entry.words), out, 0), entry.before, ("fit",),
            )
            for name, entry in group.items()
        ]
        for group in plan.shared
    ]  # fmt: skip


def common_words(plan: Plan, quick: bool) -> tuple[str, ...]:
    """Options of every run of a plan."""
    words = (*plan.words, *(plan.quick_words if quick else ()))
    if plan.epochs is None:
        return words
    epochs = plan.epochs[quick]
    every = str(max(1, epochs // 3))  # three evaluations on the way
    return (*words, "--trainer.max_epochs", str(epochs), "--trainer.check_val_every_n_epoch", every)


def filled(words: Sequence[str], out: Path, seed: int) -> tuple[str, ...]:
    """The words with `{out}` and `{seed}` replaced; other braces are left, as YAML has them."""
    return tuple(word.replace("{out}", str(out)).replace("{seed}", str(seed)) for word in words)


def plain_name(method: str) -> str:
    """A method's name as part of a folder's: `RDP (Force)` as `rdp_force`."""
    return re.sub(r"[^a-z0-9]+", "_", method.lower()).strip("_")
