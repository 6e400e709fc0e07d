"""Tiny model, data, callbacks and loggers that the command line tests name by class path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers.logger import DummyLogger

from mmtrain.config_errors import UserError


@dataclass
class OptimSettings:
    rate: float = 0.1
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.98)


class TinyModel(BoringModel):
    def __init__(
        self,
        width: int,
        eps_form: Literal["published", "true"] = "true",
        optim: OptimSettings = OptimSettings(),  # noqa: B008
        maybe: OptimSettings | None = None,
        label: str = "a",
        extra: dict[str, float] | None = None,
        api_key: str = "",
    ) -> None:
        super().__init__()
        self.seen = {"width": width, "eps_form": eps_form, "maybe": maybe, "label": label, "extra": extra}


class OtherModel(BoringModel):
    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()
        self.seen = {"width": width, "depth": depth}


class TinyData(BoringDataModule):
    def __init__(self, root: str = "", size: int = 4) -> None:
        super().__init__()
        if root == "missing":
            raise UserError("data.init_args.root: no folder missing")
        self.data_counts = {"train": size}


class Every(Callback):
    """Raises at the first training batch what its settings say."""

    def __init__(self, every: int = 1, exit_code: int | None = None, interrupt: bool = False) -> None:
        self.every, self.exit_code, self.interrupt = every, exit_code, interrupt

    def on_train_batch_start(self, *args: Any) -> None:
        if self.exit_code is not None:
            raise SystemExit(self.exit_code)
        if self.interrupt:
            raise KeyboardInterrupt


class Refuses(Callback):
    def __init__(self) -> None:
        raise UserError("refused by its constructor")


class KeepsParameters(DummyLogger):
    """A logger that remembers what it was given, for all instances."""

    received: list[dict[str, Any]] = []  # noqa: RUF012

    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.received.append(params)


class FailingLogger(DummyLogger):
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no hyper-parameters here")


class Divides(Callback):
    def __init__(self) -> None:
        _ = 1 / 0
