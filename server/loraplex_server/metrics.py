"""Every Prometheus metric: what the engine reports and what the HTTP side observes, written out when scraped.

Observing is cheap and takes no lock: everything but the writing of a scrape's text happens on the event loop.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import PLATFORM_COLLECTOR, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_adapters.registry import AdapterRegistry
from loraplex_server.engine.messages import EngineStats, StepReport
from loraplex_server.histogram import LOAD_BOUNDS, STEP_BOUNDS, Histogram
from loraplex_server.observer import Mode, RequestObserver
from loraplex_server.request_series import BASE_LABEL, SeriesByAdapter
from loraplex_server.request_text import RequestText

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# The base is the only set of weights that batches run on so far.
_VARIANT = "base"

NamesByDigest = Mapping[str, tuple[str, ...]]


def adapter_names(registry: AdapterRegistry) -> NamesByDigest:
    """Digest -> the names that stand for it now or that stood for it in an older version."""
    names: dict[str, tuple[str, ...]] = {}
    for adapter in registry.list():
        for digest in dict.fromkeys(version.digest for version in registry.versions(adapter.name)):
            names[digest] = (*names.get(digest, ()), adapter.name)
    return names


class Metrics:
    """Counts, and answers scrapes. Follows requests as ``observer.RequestObservers``.

    ``model_name`` labels the ``vllm:`` series. ``names`` says which adapters there are; it is asked at each scrape, and
    the series of a name that is gone go with it. At most ``max_adapters`` adapters have series of their own.
    """

    def __init__(self, *, model_name: str, names: Callable[[], NamesByDigest], max_adapters: int = 50) -> None:
        self._requests = SeriesByAdapter(max_adapters)
        self._engine = _EngineCounts()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Exposition(self._requests, self._engine, model_name, names))
        self._registry.register(PLATFORM_COLLECTOR)
        ProcessCollector(registry=self._registry)

    def start(self, adapter: str | None, mode: Mode) -> RequestObserver:
        """Follow one request."""
        return self._requests.watch(adapter, mode)

    def on_report(self, report: StepReport) -> None:
        """Take in what one engine step reports."""
        self._engine.add(report)

    def forget(self, name: str) -> None:
        """Drop the series of a retired adapter before the next scrape does."""
        self._requests.forget(name)

    def snapshot(self) -> "Snapshot":
        """Everything as it is now."""
        families = list(self._registry.collect())
        return Snapshot(RequestText.of(self._requests), families)

    def render(self) -> bytes:
        """Everything as it is now, in Prometheus' text format (``CONTENT_TYPE``)."""
        return self.snapshot().text()


class Snapshot(CollectorRegistry):
    """Metrics at one moment. Writing them takes far longer than taking them, and may happen on any thread."""

    def __init__(self, requests: RequestText, families: list[Metric]) -> None:
        super().__init__()
        self._requests = requests
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)

    def text(self) -> bytes:
        """Prometheus' text format (``CONTENT_TYPE``)."""
        return self._requests.text().encode() + generate_latest(self)


class _EngineCounts:
    """What steps add up to, and the engine's latest state."""

    def __init__(self) -> None:
        self.stats = EngineStats()
        self.steps = {"prefill": Histogram(STEP_BOUNDS), "decode": Histogram(STEP_BOUNDS)}
        self.tokens: Counter[str] = Counter(prefill=0, decode=0)
        self.loads = {"disk_to_host": Histogram(LOAD_BOUNDS), "host_to_gpu": Histogram(LOAD_BOUNDS)}
        self.load_bytes: Counter[str] = Counter(disk_to_host=0, host_to_gpu=0)

    def add(self, report: StepReport) -> None:
        if report.stats is not None:
            self.stats = report.stats
        if report.step_s:
            self.steps["prefill" if report.num_prefill_tokens else "decode"].observe(report.step_s)
            self.tokens["prefill"] += report.num_prefill_tokens
            self.tokens["decode"] += report.num_decode_tokens
        for load in report.loads:
            self.loads[load.step].observe(load.seconds)
            self.load_bytes[load.step] += load.num_bytes


class _Exposition(Collector):
    """Turns the counts into Prometheus' metric families."""

    def __init__(
        self,
        requests: SeriesByAdapter,
        engine: _EngineCounts,
        model_name: str,
        names: Callable[[], NamesByDigest],
    ) -> None:
        self._requests = requests
        self._engine = engine
        self._model_name = model_name
        self._names = names

    def collect(self) -> Iterable[Metric]:
        names = self._names()
        self._requests.keep({name for owners in names.values() for name in owners})
        yield from self._step_families()
        yield from self._engine_families(names)
        yield from self._vllm_families(names)

    def _step_families(self) -> Iterable[Metric]:
        steps = HistogramMetricFamily(
            "loraplex_step_seconds",
            "One forward pass with sampling, by the weights it ran on; prefill if it computed any prompt.",
            labels=["variant", "kind"],
        )
        tokens = CounterMetricFamily("loraplex_step_tokens", "Tokens computed in steps.", labels=["kind"])
        for kind, histogram in self._engine.steps.items():
            _add(steps, [_VARIANT, kind], histogram)
            tokens.add_metric([kind], self._engine.tokens[kind])
        loads = HistogramMetricFamily(
            "loraplex_adapter_load_seconds", "One copy of an adapter between disk, host and device.", labels=["step"]
        )
        load_bytes = CounterMetricFamily(
            "loraplex_adapter_load_bytes", "Bytes of adapters copied between disk, host and device.", labels=["step"]
        )
        for step, histogram in self._engine.loads.items():
            _add(loads, [step], histogram)
            load_bytes.add_metric([step], self._engine.load_bytes[step])
        return steps, tokens, loads, load_bytes

    def _engine_families(self, names: NamesByDigest) -> Iterable[Metric]:
        stats = self._engine.stats
        running = GaugeMetricFamily("loraplex_requests_running", "Sequences in the batch.", labels=["adapter"])
        waiting = GaugeMetricFamily("loraplex_requests_waiting", "Sequences in the queue.", labels=["adapter"])
        num_running, num_waiting = self._by_label(stats, names)
        for gauge, counts in ((running, num_running), (waiting, num_waiting)):
            for label, count in counts.items():
                gauge.add_metric([label], count)
        tiers = Counter(state.residency for state in stats.adapters.values())
        adapters = GaugeMetricFamily(
            "loraplex_adapters", "Adapters by the fastest place they are in.", labels=["residency"]
        )
        adapters.add_metric(["gpu"], tiers["gpu"])
        adapters.add_metric(["host"], tiers["host"])
        in_memory = {digest for digest, state in stats.adapters.items() if state.residency != "disk"}
        adapters.add_metric(["disk"], len(names.keys() - in_memory))
        memory = GaugeMetricFamily("loraplex_adapter_memory_bytes", "Memory that adapters take.", labels=["tier"])
        memory.add_metric(["gpu"], stats.adapter_bytes_used)
        memory.add_metric(["host"], stats.host_bytes_used)
        return (
            running,
            waiting,
            adapters,
            memory,
            _gauge(
                "loraplex_adapter_memory_limit_bytes",
                "Device memory set aside for adapters.",
                stats.adapter_bytes_total,
            ),
            _gauge("loraplex_kv_blocks_used", "KV blocks that sequences hold.", stats.kv_blocks_used),
            _gauge("loraplex_kv_blocks_limit", "KV blocks there are.", stats.kv_blocks_total),
            _gauge("loraplex_kv_usage_ratio", "Share of the KV blocks in use, 0 to 1.", _kv_usage(stats)),
            _counter("loraplex_preemptions", "Sequences put back for lack of KV blocks.", stats.num_preemptions),
            _counter("loraplex_prefix_hit_tokens", "Prompt tokens found in the prefix cache.", stats.prefix_hit_tokens),
            _counter("loraplex_prefix_query_tokens", "Prompt tokens looked up there.", stats.prefix_query_tokens),
        )

    def _by_label(self, stats: EngineStats, names: NamesByDigest) -> tuple[Counter[str], Counter[str]]:
        """Running and waiting sequences by adapter label; a digest counts for the first of its names."""
        running, waiting = Counter({BASE_LABEL: stats.num_base_running}), Counter({BASE_LABEL: stats.num_base_waiting})
        for digest, state in stats.adapters.items():
            if state.num_running or state.num_waiting:
                label = self._requests.label(next(iter(names.get(digest, ())), ""))
                running[label] += state.num_running
                waiting[label] += state.num_waiting
        return running, waiting

    def _vllm_families(self, names: NamesByDigest) -> Iterable[Metric]:
        """The names that gateway routers and existing dashboards read."""
        stats, everything = self._engine.stats, self._requests.all_requests
        gauges = {
            "vllm:num_requests_running": ("Sequences in the batch.", stats.num_running),
            "vllm:num_requests_waiting": ("Sequences in the queue.", stats.num_waiting),
            "vllm:kv_cache_usage_perc": ("Share of the KV blocks in use, 0 to 1.", _kv_usage(stats)),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        histograms = {
            "vllm:time_to_first_token_seconds": everything.first_token,
            "vllm:inter_token_latency_seconds": everything.inter_token,
            "vllm:e2e_request_latency_seconds": everything.request,
        }
        for name, histogram in histograms.items():
            family = HistogramMetricFamily(name, "As the loraplex series, over all adapters.", labels=["model_name"])
            _add(family, [self._model_name], histogram)
            yield family
        counters = {"vllm:prompt_tokens": everything.prompt_tokens, "vllm:generation_tokens": everything.output_tokens}
        for name, count in counters.items():
            counter = CounterMetricFamily(name, "As the loraplex series, over all adapters.", labels=["model_name"])
            counter.add_metric([self._model_name], count)
            yield counter
        yield _lora_info(stats, names)


def _lora_info(stats: EngineStats, names: NamesByDigest) -> Metric:
    """What Kubernetes' gateway reads: labels that hold lists, a value that says when they were true.

    There are no adapter slots here; ``max_lora`` is how many adapters of the resident ones' mean size would fit.
    """
    resident = [digest for digest, state in stats.adapters.items() if state.residency == "gpu"]
    waiting = [digest for digest, state in stats.adapters.items() if state.num_waiting and state.residency != "gpu"]
    fitting = len(names)
    if resident and stats.adapter_bytes_used:
        fitting = stats.adapter_bytes_total * len(resident) // stats.adapter_bytes_used
    info = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters on the device and adapters waited for; the value is the Unix time of this answer.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    max_lora = max(1, len(resident), fitting)
    info.add_metric([str(max_lora), _joined(resident, names), _joined(waiting, names)], time.time())
    return info


def _joined(digests: Iterable[str], names: NamesByDigest) -> str:
    return ",".join(sorted({name for digest in digests for name in names.get(digest, ())}))


def _kv_usage(stats: EngineStats) -> float:
    return stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    family.add_metric(labels, histogram.cumulative(), histogram.total)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
