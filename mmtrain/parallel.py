"""Training that shards a model over the processes (FSDP2), and torch.compile: both work block by block.

A LightningModule that can do so has `blocks() -> list[nn.Module]`: its repeated parts, inner ones first, none of which
is used but by calling it. A sharded tensor is a DTensor: each process holds rows of it.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from mmtrain import distributed
from mmtrain.config_errors import UserError


class FullySharded(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer state over all processes (FSDP2, arXiv 2304.11277).

    Each block is gathered when it runs and let go afterwards; what is in no block is gathered for the whole step.
    Frozen parts outside of blocks stay whole. Evaluations gather all parameters once and then run as under DDP, for
    processes may have different numbers of batches there. Checkpoints are those of DDP: one file of whole tensors, so
    a run may go on with the other strategy.

    Args:
        timeout: of collectives; a process that hangs or fails ends the job after this.
        process_group_backend: None for that of the device: nccl, or gloo on CPUs.

    Raises:
        UserError: a model without `blocks`.
    """

    def __init__(
        self, timeout: timedelta | None = timedelta(minutes=30), process_group_backend: str | None = None
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.scalars: dict[str, nn.Parameter] = {}  # those that are sharded as vectors of one number

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """As DDP's: to evaluate or predict, nothing is sharded unless it was trained just before."""
        self.accelerator.setup(trainer)
        fits = trainer.state.fn == TrainerFn.FITTING
        if fits and self._layer_sync:
            self.model = self._layer_sync.apply(self.model)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if not isinstance(self.model, FSDPModule):
            _sync_module_states(self.model)
            if fits:
                self.scalars = shard(self.model, self.device_mesh["data_parallel"])
        if fits:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fits:
            _optimizers_to_device(self.optimizers, self.root_device)

    # DDP takes the buffers of the first process in every step: fitted normalisers, statistics of BatchNorm

    def on_train_start(self) -> None:
        share_buffers(self.model)

    def on_validation_start(self) -> None:
        share_buffers(self.model)
        gather(self.model)

    def on_validation_end(self) -> None:
        let_go(self.model)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    # checkpoints: read before the model is sharded, so that all their checks see what they see under DDP

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on the first process, which alone writes; the others take part in gathering them."""
        state = self.lightning_module.state_dict()
        return {name: whole(value, name in self.scalars) for name, value in state.items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self.lightning_module.state_dict()
        state = {
            name: like(value, own[name]) if name in own else value for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As `Optimizer.state_dict`, whole on the first process."""
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        content, parameters = optimizer.state_dict(), parameters_of(optimizer)
        scalars = set(map(id, self.scalars.values()))
        state = {
            index: {key: whole(value, id(parameters[index]) in scalars) for key, value in entry.items()}
            for index, entry in content["state"].items()
        }
        return content | {"state": state}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        sharded = [
            sharded_state(optimizer, state)
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        ]
        ParallelStrategy.load_optimizer_state_dict(self, {"optimizer_states": sharded})


def shard(module: pl.LightningModule, mesh: DeviceMesh) -> dict[str, nn.Parameter]:
    """Shard a module in place over the processes of a mesh; `training_step` is then its forward method.

    Returns:
        the parameters without dimensions, which become vectors of one number, for there are no rows to share.

    Raises:
        UserError: it has no `blocks`.
    """
    blocks = blocks_of(module, "FullySharded")
    names = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
    for name in names:
        owner, _, attribute = name.rpartition(".")
        scalar = module.get_parameter(name)
        vector = nn.Parameter(scalar.detach().reshape(1), requires_grad=scalar.requires_grad)
        module.get_submodule(owner)._parameters[attribute] = vector
    for block in blocks:
        fully_shard(block, mesh=mesh)
    kind = type(module)
    frozen = {p for p in module.parameters() if not p.requires_grad and not isinstance(p, DTensor)}
    fully_shard(module, mesh=mesh, ignored_params=frozen)
    for name in ("__module__", "__name__", "__qualname__"):  # checkpoints and messages tell the model's class by these
        setattr(type(module), name, getattr(kind, name))
    register_fsdp_forward_method(module, "training_step")
    fully_shard.state(module)._lazy_init()  # else an evaluation before the first step takes some block for the root
    return {name: module.get_parameter(name) for name in names}


def blocks_of(module: pl.LightningModule, asked_by: str) -> list[nn.Module]:
    """The repeated parts of a module, inner ones first.

    Args:
        asked_by: what needs them, for the message.

    Raises:
        UserError: it has no `blocks`, or none in them.
    """
    blocks = module.blocks() if getattr(module, "blocks", None) else []
    if not blocks:
        raise UserError(
            f"{asked_by}: {type(module).__name__} has no blocks to be sharded or compiled one by one; leave it out "
            "(trainer.strategy: ddp, no Compile among trainer.callbacks)"
        )
    return blocks


def unet_blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated parts of a UNet of diffusers."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    return [module for module in network.modules() if isinstance(module, BasicTransformerBlock | ResnetBlock2D)]


def gather(module: nn.Module) -> None:
    """Bring together all parameters of a sharded module, until `let_go`; all processes must call it."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode cannot be trained afterwards
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()


def let_go(module: nn.Module) -> None:
    """Undo `gather`; does nothing where nothing is gathered."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
            part.set_reshard_after_forward(part is not module, recurse=False)  # the root is needed at once by backward


def share_buffers(module: nn.Module) -> None:
    """Give every process the buffers of the first one."""
    if distributed.world_size() > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds; all of it where nothing is sharded. The same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(value: Any, is_scalar: bool = False) -> Any:
    """A sharded tensor put together on the CPU of the first process; all processes must call it.

    Args:
        value: what is no sharded tensor is returned as it is.
        is_scalar: a vector of one number is the scalar that it was.

    Returns:
        on other processes the sharded tensor.
    """
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    if distributed.rank() != 0:
        return value
    return full.reshape(()).cpu() if is_scalar else full.cpu()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, known to every process, sharded as a parameter is."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    rows = value.to(parameter.device).reshape(parameter.shape) if value.ndim == 0 else value.to(parameter.device)
    # no source: each process cuts out its own rows
    return distribute_tensor(rows, parameter.device_mesh, parameter.placements, src_data_rank=None)


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Parameters by their number in `Optimizer.state_dict`."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def sharded_state(optimizer: Optimizer, content: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of whole tensors for `Optimizer.load_state_dict` of an optimizer of sharded parameters.

    How an optimizer goes through its parameters (`foreach`) is its own business, not the file's.
    """
    parameters = parameters_of(optimizer)
    state = {
        index: {
            # `step` is a scalar whatever the parameter is
            key: like(value, parameters[index]) if isinstance(value, Tensor) and key != "step" else value
            for key, value in entry.items()
        }
        for index, entry in content["state"].items()
        if index < len(parameters)
    }
    groups = [
        given | {key: own[key] for key in ("foreach", "fused") if key in own}
        for given, own in zip(content["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**content, "state": state, "param_groups": groups}


class Compile(pl.Callback):
    """Compiles training steps block by block with torch.compile, in place, so that checkpoints do not change.

    Blocks of the same class and sizes share their code. The first steps take minutes with "inductor", which pays in
    long trainings on a GPU; numbers differ from uncompiled ones by rounding. Evaluations are not compiled.

    Args:
        backend: of torch.compile. "aot_eager" only traces: for looking for what cannot be compiled.
        mode: of "inductor", for example "max-autotune-no-cudagraphs".
        dynamic: false compiles anew for every size of batch and every size of block, which gives the fastest code; true
            once for all sizes; None decides by what it sees.

    Raises:
        UserError: an unknown backend or mode, or a model without `blocks`.
    """

    def __init__(self, backend: str = "inductor", mode: str | None = None, dynamic: bool | None = False) -> None:
        backends, modes = torch.compiler.list_backends(exclude_tags=()), list(torch._inductor.list_mode_options())
        if backend not in backends:
            raise UserError(f"compile: backend: {backend!r} is not one of {', '.join(backends)}")
        if mode is not None and (backend != "inductor" or mode not in modes):
            raise UserError(f"compile: mode: {mode!r}, expected one of {', '.join(modes)}, and backend inductor")
        self.backend, self.mode, self.dynamic = backend, mode, dynamic

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        blocks = [block for block in blocks_of(pl_module, "Compile") if list(block.children())]  # no single layers
        config = torch._dynamo.config
        # all blocks count as one function, which is left uncompiled after so many versions; one may have several
        config.recompile_limit = max(config.recompile_limit, 4 * len(blocks))
        for block in blocks:
            block.compile(backend=self.backend, mode=self.mode, dynamic=self.dynamic)

    def _run_as_written(self, *_: Any) -> None:
        torch.compiler.set_stance("force_eager")  # compiling for batches of many sizes takes longer than it saves

    def _run_compiled(self, *_: Any) -> None:
        torch.compiler.set_stance("default")

    on_validation_start = on_test_start = on_predict_start = _run_as_written
    on_validation_end = on_test_end = on_predict_end = on_exception = _run_compiled
