"""How even the load of the GPUs was, over windows of passes; optionally as Prometheus gauges."""

import itertools
import logging
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_align_jax._core import checks
from moe_align_jax.eplb import balancedness

WINDOWS = (10, 100, 1000)
logger = logging.getLogger("moe_align_jax.recorder")


class LoadMetrics(NamedTuple):
    """What `ExpertDistributionRecorder.metrics` answers, for N recorded passes and D GPUs.

    Attributes:
        passes: N.
        balancedness: per window, `[L]` float64: the mean, over those of the last `window` passes (or of
            all N where there are fewer) in which the layer had a token, of mean tokens per GPU / tokens
            of the busiest GPU. 1 is even. NaN for an idle layer: one without a token in the window.
        tokens_per_gpu: `[L, D]` int64, summed over the longest window.
    """

    passes: int
    balancedness: dict[int, np.ndarray]
    tokens_per_gpu: np.ndarray

    def average(self, window: int) -> float:
        """Mean balancedness over the layers that are not idle; NaN where all are."""
        layers = self._of_window(window)
        live = layers[~np.isnan(layers)]
        return float(live.mean()) if live.size else float("nan")

    def idle_layers(self, window: int) -> int:
        """How many layers had no token in the window: those that `average` leaves out."""
        return int(np.isnan(self._of_window(window)).sum())

    def _of_window(self, window: int) -> np.ndarray:
        if window not in self.balancedness:
            rule = f"be one of {', '.join(map(str, self.balancedness))}"
            remedy = "Ask metrics(windows) for it."
            raise ValueError(checks.message("LoadMetrics", "window", rule, window, remedy))
        return self.balancedness[window]


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
        >>> counts = np.array([[[4, 0, 0, 0], [0] * 4], [[1, 1, 1, 1], [0] * 4], [[0] * 4, [0] * 4]])
        >>> metrics = load_metrics(counts, num_gpus=4, windows=(2, 10))
        >>> {window: value.round(3).tolist() for window, value in metrics.balancedness.items()}
        {2: [1.0, nan], 10: [0.625, nan]}
        >>> round(metrics.average(10), 3), metrics.idle_layers(10), metrics.tokens_per_gpu.tolist()
        (0.625, 1, [[5, 1, 1, 1], [0, 0, 0, 0]])
    """
    count, layers, experts = physical_count.shape
    each = np.zeros((0, layers))
    if count:
        each = balancedness(physical_count, num_gpus).astype(np.float64)
    live = physical_count.any(axis=-1)
    longest = physical_count[-max(windows) :]
    per_gpu = longest.reshape(len(longest), layers, num_gpus, experts // num_gpus)
    return LoadMetrics(
        count if passes is None else passes,
        {window: _mean(each[-window:], live[-window:]) for window in windows},
        per_gpu.sum(axis=(0, 3), dtype=np.int64),
    )


def _mean(values: np.ndarray, live: np.ndarray) -> np.ndarray:
    """`[L]` means of `[N, L]` values over the passes that are live; NaN where none is."""
    passes = live.sum(axis=0)
    total = np.where(live, values, 0).sum(axis=0)
    return np.where(passes > 0, total / np.maximum(passes, 1), np.nan)


class _Families(NamedTuple):
    """The gauges of one registry, and the recorders that write them, by name."""

    balancedness: Any
    idle: Any
    tokens: Any
    passes: Any
    writers: "weakref.WeakValueDictionary[str, Gauges]"


_of_registry: "weakref.WeakKeyDictionary[Any, _Families]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _families(registry: Any) -> _Families:
    """Those of the registry, which are made once: Prometheus refuses a second gauge of a name."""
    try:
        from prometheus_client import Gauge
    except ImportError as error:
        raise ImportError(
            "ExpertDistributionRecorder: registry must find prometheus-client; got none. "
            "Install the extra: pip install 'moe-align-jax[metrics]' (in a checkout: "
            "pip install -e '.[metrics]')."
        ) from error
    if not callable(getattr(registry, "register", None)):
        rule, got = "be a prometheus_client.CollectorRegistry", checks.describe(registry)
        remedy = "None makes no gauges."
        function = "ExpertDistributionRecorder"
        raise TypeError(checks.message(function, "registry", rule, got, remedy))
    if registry not in _of_registry:

        def gauge(name: str, text: str, *labels: str) -> Any:
            return Gauge(name, text, ["name", *labels], registry=registry)

        _of_registry[registry] = _Families(
            gauge(
                "moe_align_expert_balancedness",
                "Mean tokens per GPU over those of the busiest GPU; 1 is even. Idle layers have none.",
                "layer",
                "window",
            ),
            gauge("moe_align_idle_layers", "Layers without a token in the window.", "window"),
            gauge(
                "moe_align_expert_tokens",
                "Tokens per GPU and layer over the longest window.",
                "layer",
                "gpu",
            ),
            gauge("moe_align_recorded_passes", "Forward passes in the ring."),
            weakref.WeakValueDictionary(),
        )
    return _of_registry[registry]


class Gauges:
    """The metrics of one recorder for Prometheus, in a registry of `prometheus-client` (extra "metrics").

    Recorders of one registry share its gauges; the label `name` tells them apart.
    """

    def __init__(self, registry: Any, name: str | None = None):
        with _lock:
            self._families = _families(registry)
            writers = self._families.writers
            if name is None:
                free = itertools.chain([""], map(str, itertools.count(2)))
                name = next(each for each in free if each not in writers)
            elif name in writers:
                logger.warning(
                    "two recorders of one registry have the name %r: the later writes it", name
                )
            self.name = name
            writers[name] = self
        self._shown: set[tuple[str, str]] = set()  # (layer, window) that have a balancedness

    def set(self, metrics: LoadMetrics) -> None:
        found, name = self._families, self.name
        found.passes.labels(name).set(metrics.passes)
        shown = set()
        for window, layers in metrics.balancedness.items():
            found.idle.labels(name, window).set(metrics.idle_layers(window))
            for layer, value in enumerate(layers):
                if not np.isnan(value):
                    found.balancedness.labels(name, layer, window).set(value)
                    shown.add((str(layer), str(window)))
        for labels in self._shown - shown:  # idle by now: no value is better than an old one
            found.balancedness.remove(name, *labels)
        self._shown = shown
        for layer, gpus in enumerate(metrics.tokens_per_gpu):
            for gpu, tokens in enumerate(gpus):
                found.tokens.labels(name, layer, gpu).set(tokens)
