"""What GPUs can do at most, from their makers' data sheets; the one place that `plan` and `Throughput` read it from."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Peaks are TFLOP/s (1e12) of dense matrix products on the fastest unit with the format, without 2:4 sparsity (data
    sheets often print only the double). 16-bit formats sum in float32, as PyTorch does. None: the format is missing.
    Bandwidths are GB/s (1e9 bytes) and one way, which is what one direction of a ring moves; data sheets add both ways.

    Attributes:
        memory: GiB as a program sees it: a little less than what is sold.
        memory_bandwidth: of that memory.
        link: to the other GPUs of the same host: NVLink where there is one, else PCIe.
        network: to other hosts, for each GPU, of the maker's own servers with this card. A cluster may have less.
        source: of the figures.
    """

    name: str
    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float
    source: str

    def peak(self, precision: str, tf32: bool = False) -> float | None:
        """TFLOP/s of a Lightning precision; None where this GPU has no such format, or the table no figure (float64).

        Args:
            precision: such as "bf16-mixed", "16-true", "32-true".
            tf32: whether products of float32 may be rounded to TF32 (`torch.set_float32_matmul_precision`).
        """
        kind = precision.partition("-")[0]
        if kind == "32":
            return self.tf32 if tf32 and self.tf32 else self.fp32
        return {"bf16": self.bf16, "16": self.fp16}.get(kind)


# fmt: off
GPUS = {
    gpu.name: gpu
    for gpu in (
        #            bf16  fp16  tf32    fp32  GiB   GB/s  link net, source: NVIDIA's data sheet of that name...
        Gpu("b200",      2250, 2250, 1125, 75, 178, 7700, 900, 50, "DGX B200: 16 bit dense is a quarter of sparse FP8"),
        Gpu("h200",       989,  989,  494, 67, 140, 4800, 450, 50, "H200 (SXM), DGX H200: 400 Gb/s a GPU"),
        Gpu("h200-nvl",   835,  835,  417, 60, 140, 4800, 450, 25, "H200 (NVL); 200 Gb/s assumed"),
        Gpu("h100",       989,  989,  494, 67,  79, 3350, 450, 50, "H100 (SXM), DGX H100: 400 Gb/s a GPU"),
        Gpu("h100-nvl",   835,  835,  417, 60,  93, 3900, 300, 25, "H100 (NVL, one card); 200 Gb/s assumed"),
        Gpu("h100-pcie",  756,  756,  378, 51,  79, 2000, 300, 25, "H100 (PCIe); 200 Gb/s assumed"),
        Gpu("a100",      312,  312,  156, 19.5, 79, 2039, 300, 25, "A100 (80 GB SXM), DGX A100: 200 Gb/s a GPU"),
        Gpu("a100-40gb", 312,  312,  156, 19.5, 39, 1555, 300, 25, "A100 (40 GB SXM), DGX A100: 200 Gb/s a GPU"),
        Gpu("a100-pcie", 312,  312,  156, 19.5, 79, 1935, 300, 12.5, "A100 (80 GB PCIe, bridges); 100 Gb/s assumed"),
        Gpu("l40s",      362,  362,  183, 91.6, 44,  864,  32, 12.5, "L40S (PCIe 4.0 x16); 100 Gb/s assumed"),
        Gpu("l40",       181,  181, 90.5, 90.5, 44,  864,  32, 12.5, "L40 (PCIe 4.0 x16); 100 Gb/s assumed"),
        Gpu("l4",        121,  121,   60, 30.3, 22,  300,  32, 12.5, "L4 (prints the sparse double); 100 Gb/s assumed"),
        Gpu("a40",       150,  150,   75, 37.4, 44,  696,  56, 12.5, "A40 (bridged pairs); 100 Gb/s assumed"),
        Gpu("a6000",     155,  155,   77, 38.7, 47,  768,  56, 12.5, "GA102 whitepaper; 100 Gb/s assumed"),
        Gpu("a10",       125,  125, 62.5, 31.2, 22,  600,  32, 12.5, "A10; 100 Gb/s assumed"),
        Gpu("v100",      None, 125, None, 15.7, 31,  900, 150, 12.5, "V100 (32 GB SXM2); 100 Gb/s assumed"),
        Gpu("t4",        None,  65, None, 8.1, 14.6, 320,  16, 6.25, "T4 (PCIe 3.0 x16); 50 Gb/s assumed"),
        Gpu("rtx-5090",  210,  210,  105, 105,  31, 1792,  64, 1.25, "RTX Blackwell whitepaper; 10 Gb/s assumed"),
        Gpu("rtx-4090",  165,  165, 82.6, 82.6, 23.5, 1008, 32, 1.25, "Ada whitepaper; 10 Gb/s assumed"),
        Gpu("rtx-3090",   71,   71, 35.6, 35.6, 23.5,  936, 32, 1.25, "GA102 whitepaper; 10 Gb/s assumed"),
        # One core of a processor, to plan with: 16 multiply-adds of float32 a cycle (AVX2) at 3 GHz, and no bf16 unit.
        Gpu("cpu",       0.1,  0.1,  0.1,  0.1,  4,   10,  10, 1.25, "no data sheet: assumed"),
    )
}
# fmt: on

# How drivers call them, most special first: `torch.cuda.get_device_name()`, for example "NVIDIA H100 80GB HBM3".
DEVICE_NAMES = (
    (r"\bH200 NVL\b", "h200-nvl"),
    (r"\bH200\b", "h200"),
    (r"\bH100 NVL\b", "h100-nvl"),
    (r"\bH100 PCIe\b", "h100-pcie"),
    (r"\bH100\b", "h100"),
    (r"\bB200\b", "b200"),
    (r"\bA100\b.*\b40GB\b", "a100-40gb"),
    (r"\bA100\b.*\bPCIe\b", "a100-pcie"),
    (r"\bA100\b", "a100"),
    (r"\bL40S\b", "l40s"),
    (r"\bL40\b", "l40"),
    (r"\bL4\b", "l4"),
    (r"\bA40\b", "a40"),
    (r"\bRTX A6000\b", "a6000"),
    (r"\bA10\b", "a10"),
    (r"\bV100\b", "v100"),
    (r"\bT4\b", "t4"),
    (r"\bRTX 5090\b(?! Laptop)", "rtx-5090"),
    (r"\bRTX 4090\b(?! Laptop| D)", "rtx-4090"),
    (r"\bRTX 3090\b(?! Ti)", "rtx-3090"),
)


def gpu_of(device_name: str) -> Gpu | None:
    """The table's entry for what a driver calls its device; None for one that it does not know.

    >>> gpu_of("NVIDIA H100 80GB HBM3").name, gpu_of("NVIDIA A100-SXM4-40GB").name, gpu_of("Radeon VII")
    ('h100', 'a100-40gb', None)
    """
    words = device_name.replace("-", " ")
    found = next((name for pattern, name in DEVICE_NAMES if re.search(pattern, words, re.IGNORECASE)), None)
    return GPUS[found] if found else None
