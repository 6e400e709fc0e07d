"""The verb `plan`: what a config needs on N hosts, how long it takes, and what will hold it up.

Bytes and operations are counted in a trial on this machine (`mmtrain.footprint`); speeds of GPUs and networks are those
of their data sheets (`mmtrain.gpus`), times an assumed utilisation.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from mmtrain.config_errors import UserError, nearest
from mmtrain.config_layers import load, split_arguments
from mmtrain.gpus import GPUS, Gpu

UTILISATION = 0.35  # share of the peak that trainings of transformers reach; assumed
NETWORK_SHARE = 0.7  # of a link's bandwidth that a ring reaches; assumed
CONTEXT = 0.7 * 2**30  # bytes that CUDA, cuBLAS and NCCL take on each GPU; assumed
HEADROOM = 0.92  # share of the memory that may be planned with: the rest is lost to fragments
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Bytes, seconds and counts; memory is that of one GPU, network what each GPU sends in a step."""

    processes: int
    samples_each: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    buckets: float
    memory: float
    memory_limit: float
    network: float
    compute_seconds: float
    network_seconds: float
    step_seconds: float
    samples_per_second: float
    loader_cores_each: float
    steps: int
    hours: float
    checkpoint: int
    bottleneck: str
    advice: str


def main(argv: list[str]) -> int:
    """Try the config, then print the plan as a table, or as JSON.

    Raises:
        UserError: a mistake in the config, data that are not there, a batch that cannot be shared out, an unknown GPU.
    """
    parser = argparse.ArgumentParser(prog="python -m mmtrain plan", allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=1, help="hosts")
    parser.add_argument("--gpu", default="h100", help=", ".join(GPUS))
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--samples", type=int, help="training samples, where those at hand are stand-ins")
    parser.add_argument("--cores", type=int, default=12, help="processor cores a GPU")
    parser.add_argument("--json", action="store_true")
    options, words = parser.parse_known_args(argv)
    if options.gpu not in GPUS:
        hint = nearest(options.gpu, GPUS) or ", ".join(GPUS)
        raise UserError(f"plan: --gpu {options.gpu}: not in the table; nearest: {hint}")
    names, settings = split_arguments(words)
    if not names:
        raise UserError("plan: which training? -c CONFIG")
    data = load(names, settings).data
    batch = (data.get("data", {}).get("init_args") or {}).get("batch_size")
    if not isinstance(batch, int):
        raise UserError("plan: data.batch_size is not set in the config")
    gpu, processes = GPUS[options.gpu], options.nodes * options.gpus_per_node
    if batch % processes:
        raise UserError(f"plan: the global batch of {batch} cannot be divided among {processes} GPUs")
    precision = str(data["trainer"].get("precision", "32-true"))
    from mmtrain.footprint import measure  # Lightning comes with it

    trial = measure(names, settings)
    steps = steps_of_run(data["trainer"], options.samples or trial.samples, batch)
    found = make(trial, batch, processes, gpu, precision, options, steps)
    if options.json:
        print(json.dumps({"trial": asdict(trial), "plan": asdict(found)}, indent=1))
    else:
        show(found, trial, batch, gpu, precision, options)
    return 0


def steps_of_run(trainer: dict, samples: int, batch: int) -> int:
    """Batches until the first of the config's limits, `max_steps` (of the optimizer) and `max_epochs`.

    >>> steps_of_run({"max_epochs": 15}, 4254, 256)
    240
    """
    per_epoch, accumulate = max(1, samples // batch), trainer.get("accumulate_grad_batches") or 1
    limits = [(trainer.get("max_steps") or 0) * accumulate, (trainer.get("max_epochs") or 0) * per_epoch]
    return min((limit for limit in limits if limit > 0), default=per_epoch)


def make(trial, batch: int, processes: int, gpu: Gpu, precision: str, options: argparse.Namespace, steps: int) -> Plan:
    """Everything that follows from a trial (`footprint.Footprint`)."""
    each, sharded = batch // processes, options.strategy == "fsdp"
    part = processes if sharded else 1
    activations = max(0.0, trial.passing(each))
    buckets = trial.gradients if processes > 1 and not sharded else 0.0
    memory = (trial.weights + trial.gradients + trial.optimizer) / part + activations + buckets
    memory += CONTEXT if gpu.name != "cpu" else 0.0
    ring = (processes - 1) / processes
    network = ring * ((2 * trial.weights + trial.gradients) if sharded else 2 * trial.gradients)
    bandwidth = min(gpu.link, gpu.network) if options.nodes > 1 else gpu.link
    peak = gpu.peak(precision)
    if peak is None:
        raise UserError(f"plan: trainer.precision {precision}: {gpu.name} has no such format, or no figure for it")
    compute = trial.flops * each / (peak * 1e12 * UTILISATION)
    transfer = network / (bandwidth * 1e9 * NETWORK_SHARE) if processes > 1 else 0.0
    reading = each * trial.loader_seconds
    step = max(compute, transfer, reading / options.cores)
    limit = HEADROOM * gpu.memory * GIB
    bottleneck, advice = verdict(memory, limit, compute, transfer, reading / options.cores, options)
    return Plan(
        processes, each, trial.weights / part, trial.gradients / part, trial.optimizer / part, activations, buckets,
        memory, limit, network, compute, transfer, step, batch / step, reading / max(compute, transfer), steps,
        steps * step / 3600, trial.checkpoint, bottleneck, advice,
    )  # fmt: skip


def verdict(
    memory: float, limit: float, compute: float, transfer: float, reading: float, options: argparse.Namespace
) -> tuple[str, str]:
    """What holds a run up, and what to change."""
    if memory > limit:
        more = "--strategy fsdp, " if options.strategy == "ddp" else ""
        return "memory", f"it does not fit: {more}more GPUs, model.micro_batch or gradient_checkpointing, bf16-mixed"
    longest = max(compute, transfer, reading)
    if longest == reading:
        return "loader", "more cores a GPU, pictures stored smaller, or features kept (see the config's data settings)"
    if longest == transfer:
        return "network", "a larger batch, accumulate_grad_batches, or fewer hosts; sharding sends more, not less"
    return "compute", "more GPUs shorten it; bf16-mixed and torch.compile (mmtrain.parallel.Compile) are faster"


def show(plan: Plan, trial, batch: int, gpu: Gpu, precision: str, options: argparse.Namespace) -> None:
    """The plan as a table, and by what rules it was made."""
    gib, table = lambda size: f"{size / GIB:.2f} GiB", Table(show_header=False)
    title = f"{plan.processes} x {gpu.name}, {options.strategy}, {precision}, global batch {batch}"
    table.title, table.title_justify = title, "left"
    for name, value in (
        ("parameters", f"{trial.parameters:,} ({trial.trained:,} trained)"),
        ("memory of a GPU", f"{gib(plan.memory)} of {gib(plan.memory_limit)}"),
        ("  weights, gradients", f"{gib(plan.weights)}, {gib(plan.gradients)}"),
        ("  optimizer and averages", gib(plan.optimizer)),
        ("  activations, temporaries", f"{gib(plan.activations)} for {plan.samples_each} samples"),
        ("  buckets of gradients", gib(plan.buckets)),
        ("sent by a GPU in a step", gib(plan.network)),
        ("a step", f"compute {plan.compute_seconds:.4f} s, network {plan.network_seconds:.4f} s, at best"),
        ("samples", f"{plan.samples_per_second:,.0f} a second"),
        ("loader", f"{plan.loader_cores_each:.1f} cores a GPU to keep up"),
        ("run", f"{plan.steps:,} steps, {plan.hours:.2f} hours"),
        ("checkpoint", f"{gib(plan.checkpoint)}, three at most on disk"),
        ("bottleneck", f"{plan.bottleneck}: {plan.advice}"),
    ):
        table.add_row(name, value)
    console = Console(width=110)
    console.print(table)
    console.print(
        f"Counted in three steps on this CPU: bytes, operations ({trial.flops / 1e9:.2f} GFLOP a sample), seconds to "
        f"read a sample ({trial.loader_seconds * 1e3:.2f} ms of one core).\n"
        f"From data sheets: {gpu.source}. Assumed: {UTILISATION:.0%} of the peak, {NETWORK_SHARE:.0%} of the network, "
        f"{CONTEXT / GIB:.1f} GiB of CUDA's own, network and compute at the same time; a ring sends 2 (n - 1) / n "
        "of the gradients, FSDP gathers weights twice and scatters gradients.",
        highlight=False,
    )
