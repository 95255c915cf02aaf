"""How even the load of the GPUs was, over windows of passes; optionally as Prometheus gauges."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_align_jax.eplb import balancedness

WINDOWS = (10, 100, 1000)


class LoadMetrics(NamedTuple):
    """What `ExpertDistributionRecorder.metrics` answers, for N recorded passes and D GPUs.

    Attributes:
        passes: N.
        balancedness: per window, `[L]` float64: the mean, over the last `window` passes (or all N
            where there are fewer), of mean tokens per GPU / tokens of the busiest GPU. 1 is even.
            Layers without a token count as even. NaN without a pass.
        tokens_per_gpu: `[L, D]` int64, summed over the longest window.
    """

    passes: int
    balancedness: dict[int, np.ndarray]
    tokens_per_gpu: np.ndarray

    def average(self, window: int) -> float:
        """Mean balancedness over the layers."""
        return float(self.balancedness[window].mean())


def load_metrics(
    physical_count: np.ndarray,
    num_gpus: int,
    windows: Sequence[int] = WINDOWS,
    *,
    passes: int | None = None,
) -> LoadMetrics:
    """From `[N, L, Ep]` counts, oldest pass first; slot p is on GPU `p // (Ep / num_gpus)`.

    They may be the last of so many `passes`, as long as the longest window.

    Example:
        >>> counts = np.array([[[4, 0, 0, 0]], [[1, 1, 1, 1]]])
        >>> metrics = load_metrics(counts, num_gpus=4, windows=(1, 10))
        >>> {window: value.round(3).tolist() for window, value in metrics.balancedness.items()}
        {1: [1.0], 10: [0.625]}
        >>> metrics.tokens_per_gpu.tolist()
        [[5, 1, 1, 1]]
    """
    count, layers, experts = physical_count.shape
    each = np.zeros((0, layers))
    if count:
        each = balancedness(physical_count, num_gpus).astype(np.float64)
    longest = physical_count[-max(windows) :]
    per_gpu = longest.reshape(len(longest), layers, num_gpus, experts // num_gpus)
    nothing = np.full(layers, np.nan)
    return LoadMetrics(
        count if passes is None else passes,
        {window: each[-window:].mean(axis=0) if count else nothing for window in windows},
        per_gpu.sum(axis=(0, 3), dtype=np.int64),
    )


class Gauges:
    """The metrics for Prometheus, in a registry of `prometheus-client` (extra "metrics")."""

    def __init__(self, registry: Any):
        try:
            from prometheus_client import Gauge
        except ImportError as error:
            raise ImportError(
                "ExpertDistributionRecorder: registry must find prometheus-client; got none. "
                "Install the extra: pip install 'moe-align-jax[metrics]' (in a checkout: "
                "pip install -e '.[metrics]')."
            ) from error
        self._balancedness = Gauge(
            "moe_align_expert_balancedness",
            "Mean tokens per GPU over those of the busiest GPU; 1 is even.",
            ["layer", "window"],
            registry=registry,
        )
        self._tokens = Gauge(
            "moe_align_expert_tokens",
            "Tokens per GPU and layer over the longest window.",
            ["layer", "gpu"],
            registry=registry,
        )
        self._passes = Gauge(
            "moe_align_recorded_passes", "Forward passes in the ring.", registry=registry
        )

    def set(self, metrics: LoadMetrics) -> None:
        self._passes.set(metrics.passes)
        for window, layers in metrics.balancedness.items():
            for layer, value in enumerate(layers):
                self._balancedness.labels(layer, window).set(value)
        for layer, gpus in enumerate(metrics.tokens_per_gpu):
            for gpu, tokens in enumerate(gpus):
                self._tokens.labels(layer, gpu).set(tokens)
