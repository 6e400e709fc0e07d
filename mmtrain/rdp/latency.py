"""How long the two steps of a policy take on this machine, one robot at a time."""

import time
from typing import TYPE_CHECKING

import numpy as np

from mmtrain.metrics.latency import InferenceLatency
from mmtrain.rdp.fast_step import NumpyDecoder
from mmtrain.rdp.planning import plans

if TYPE_CHECKING:
    from mmtrain.rdp.module import PolicyModule

WARM_UP = 5
IDENTITY_POSE = (0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def blank_observation(module: "PolicyModule") -> dict[str, np.ndarray]:
    """A raw stack of two observations of the right shapes."""
    spec = module.spec
    shown = {key: np.tile(np.float32(IDENTITY_POSE), (2, 1)) for key in spec.low_dim if key.endswith("_pose")}
    widths = {key: 6 if key.endswith("_wrench") else width for key, width in spec.low_dim.items()}
    shown |= {key: np.zeros((2, width), np.float32) for key, width in widths.items() if key not in shown}
    return shown | {key: np.zeros((2, *module.obs_encoder.images[key], 3), np.uint8) for key in spec.images}


def measure_latency(module: "PolicyModule", repeats: int = 30) -> dict[str, float]:
    """Median, p95 and p99 of the slow step in ms and of the fast one in us, as they are logged.

    Of this process alone, others may wait. The paper's Table I has 120, 100 and below 1 ms on an RTX 4090; ours are of
    the machine at hand.
    """
    observation, slow = blank_observation(module), InferenceLatency(module.device, WARM_UP, sync_on_compute=False)
    for _ in range(repeats + WARM_UP):
        began = time.perf_counter()
        plan = plans(module, [observation], [0], [0])[0]
        slow.update(time.perf_counter() - began)
    found = {f"slow_{name}_ms": 1e3 * value for name, value in slow.compute().items()}
    if plan.is_condition:
        decoder = NumpyDecoder.from_state(module.tokenizer.state_dict())
        fast = InferenceLatency("cpu", WARM_UP, sync_on_compute=False)
        touch, state = np.zeros(decoder.touch_dim), decoder.start(plan.rows)
        for _ in range(20 * repeats + WARM_UP):
            began = time.perf_counter()
            decoder.step(state, touch)
            fast.update(time.perf_counter() - began)
        found |= {f"fast_{name}_us": 1e6 * value for name, value in fast.compute().items()}
    return {f"test/{module.spec.task}/{name}": float(value) for name, value in found.items()}
