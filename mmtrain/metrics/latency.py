"""Inference latency: median and tail of measured times (RDP spec section 7.4)."""

import platform
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtrain.metrics.ranking import RowMetric

PERCENTILES = (50, 95, 99)


def device_name(device: torch.device | str = "cpu") -> str:
    """Name of a GPU, or of the processor, e.g. "NVIDIA H100" or "AMD EPYC 7763 64-Core Processor"."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "unknown processor"


class InferenceLatency(RowMetric):
    """Percentiles of one module's latency over all processes.

    Args:
        measured: device on which the module runs; its name is kept as `device_name`.
        warm_up: measurements that each process drops at its beginning, while caches fill and kernels are chosen.
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = InferenceLatency(warm_up=1)
        >>> metric.update(torch.tensor([5.0, 0.25, 0.5, 0.75]))
        >>> metric.compute()["p50"]
        tensor(0.5000, dtype=torch.float64)
    """

    full_state_update = True  # else `forward` would reset the count of the warm-up
    higher_is_better = False

    def __init__(self, measured: torch.device | str = "cpu", warm_up: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if warm_up < 0:
            raise ValueError(f"warm_up must be 0 or more, got {warm_up}")
        self.warm_up, self.device_name = warm_up, device_name(measured)
        self.add_state("num_seen", torch.tensor(0), dist_reduce_fx="sum")
        self.add_rows("seconds", torch.float32)

    def update(self, seconds: Tensor | float) -> None:
        """Add one measurement or several, in the order in which they were made, in seconds.

        Raises:
            ValueError: one is negative or not finite.
        """
        seconds = torch.as_tensor(seconds, dtype=torch.float32, device=self.device).flatten()
        if not (seconds.isfinite() & (seconds >= 0)).all():
            raise ValueError(f"seconds must be finite and not negative, got {seconds.tolist()}")
        self.seconds.append(seconds[max(0, self.warm_up - int(self.num_seen)) :])
        self.num_seen += len(seconds)

    def compute(self) -> dict[str, Tensor]:
        """Return p50, p95 and p99 in seconds, float64, linear between measurements; NaN if none is left."""
        seconds = self.rows("seconds").cpu()  # before the float64, which not every device has
        if not seconds.numel():
            warnings.warn("InferenceLatency has no measurement after the warm-up: its values are NaN", stacklevel=2)
            seconds = torch.full((1,), torch.nan)
        found = seconds.double().quantile(torch.tensor(PERCENTILES, dtype=torch.float64) / 100)
        return {f"p{percent}": value for percent, value in zip(PERCENTILES, found, strict=True)}
