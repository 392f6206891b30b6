"""What Prometheus sees: of requests, of the engine, and of a live server."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraplex_server.auth import Access, Keys
from loraplex_server.engine.messages import AdapterLoad, AdapterState, EngineStats, StepReport
from loraplex_server.histogram import TOKEN_BOUNDS, Histogram
from loraplex_server.metrics import Metrics, NamesByDigest
from loraplex_server.model.decoder import Decoder
from loraplex_server.request_series import SeriesByAdapter
from tests.api.live import live_server, live_services, save_adapter, zipped
from tests.api.servers import serve, wait_until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_metrics(names: NamesByDigest | None = None, max_adapters: int = 50) -> Metrics:
    return Metrics(model_name="tiny", names=lambda: names or {}, max_adapters=max_adapters)


def finish(metrics: Metrics, adapter: str | None, *, seconds: float = 1.0) -> None:
    watch = metrics.start(adapter, "base" if adapter is None else "unmerged")
    watch.on_first_token(0.25)
    watch.on_tokens(2, 0.02)
    watch.on_finish("stop", seconds=seconds, prompt_tokens=5, output_tokens=3, queue_s=0.1)


def test_a_histogram_counts_up_to_each_bound() -> None:
    histogram = Histogram((0.1, 1.0))
    for observed in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(observed)
    assert histogram.cumulative() == [("0.1", 2.0), ("1.0", 3.0), ("+Inf", 4.0)]
    assert histogram.count == 4
    assert histogram.total == pytest.approx(7.65)


def test_token_times_begin_at_half_a_millisecond() -> None:
    assert TOKEN_BOUNDS[0] == 0.0005
    assert list(TOKEN_BOUNDS) == sorted(set(TOKEN_BOUNDS))


def test_a_request_is_counted_by_adapter_and_mode() -> None:
    metrics = make_metrics({"d" * 64: ("poet",)})
    finish(metrics, "poet")
    finish(metrics, None)
    samples = samples_of(metrics.render().decode())
    for labels in ({"adapter": "poet", "mode": "unmerged"}, {"adapter": "base", "mode": "base"}):
        assert value(samples, "loraplex_requests_total", **labels, outcome="stop") == 1
        assert value(samples, "loraplex_prompt_tokens_total", **labels) == 5
        assert value(samples, "loraplex_output_tokens_total", **labels) == 3
        assert value(samples, "loraplex_time_to_first_token_seconds_sum", **labels) == 0.25
        assert value(samples, "loraplex_inter_token_seconds_count", **labels) == 2
        assert value(samples, "loraplex_inter_token_seconds_bucket", **labels, le="0.01") == 2
        assert value(samples, "loraplex_request_seconds_count", **labels) == 1
        assert value(samples, "loraplex_queue_seconds_sum", **labels) == pytest.approx(0.1)
    assert value(samples, "vllm:time_to_first_token_seconds_count", model_name="tiny") == 2
    assert value(samples, "vllm:inter_token_latency_seconds_count", model_name="tiny") == 4
    assert value(samples, "vllm:generation_tokens_total", model_name="tiny") == 6


def test_a_refused_request_says_nothing_about_how_long_answers_take() -> None:
    metrics = make_metrics()
    metrics.start(None, "base").on_finish("rejected", seconds=0.001, prompt_tokens=5, output_tokens=0, queue_s=None)
    samples = samples_of(metrics.render().decode())
    labels = {"adapter": "base", "mode": "base"}
    assert value(samples, "loraplex_requests_total", **labels, outcome="rejected") == 1
    assert value(samples, "loraplex_request_seconds_count", **labels) == 0
    assert value(samples, "loraplex_queue_seconds_count", **labels) == 0


def test_adapters_beyond_the_cap_share_one_series() -> None:
    names = {f"{i:064x}": (f"a{i}",) for i in range(10)}
    metrics = make_metrics(names, max_adapters=3)
    for i in range(10):
        finish(metrics, f"a{i}")
    samples = samples_of(metrics.render().decode())
    counted = {
        dict(labels)["adapter"]: count for (name, labels), count in samples.items() if name == "loraplex_requests_total"
    }
    assert counted == {"a0": 1, "a1": 1, "a2": 1, "other": 7}


def test_a_place_is_given_on_only_after_a_while() -> None:
    clock = Clock()
    series = SeriesByAdapter(max_adapters=2, clock=clock)
    series.watch("old", "unmerged")
    clock.now = 100.0
    series.watch("busy", "unmerged")
    series.watch("new", "unmerged")
    assert (series.label("old"), series.label("new")) == ("old", "other")
    clock.now = 320.0
    series.watch("new", "unmerged")
    assert (series.label("old"), series.label("busy"), series.label("new")) == ("other", "busy", "new")


def test_adapters_called_base_and_other_are_told_apart() -> None:
    metrics = make_metrics({"0" * 64: ("base",), "1" * 64: ("other",), "2" * 64: ("third",)}, max_adapters=1)
    for adapter in ("base", "other", "third", None):
        finish(metrics, adapter)
    samples = samples_of(metrics.render().decode())
    assert value(samples, "loraplex_requests_total", adapter="other", mode="unmerged", outcome="stop") == 2


def test_a_retired_adapter_s_series_go() -> None:
    names = {"0" * 64: ("poet",), "1" * 64: ("bard",)}
    metrics = make_metrics(names)
    finish(metrics, "poet")
    finish(metrics, "bard")
    assert b'adapter="poet"' in metrics.render()
    del names["0" * 64]
    text = metrics.render()
    assert b'adapter="poet"' not in text
    assert b'adapter="bard"' in text
    metrics.forget("bard")
    assert b'adapter="bard"' not in metrics.render()


def test_the_engine_s_state() -> None:
    names = {"a" * 64: ("hot",), "b" * 64: ("warm", "warm-too"), "c" * 64: ("cold",)}
    metrics = make_metrics(names)
    for name in ("hot", "warm"):
        metrics.start(name, "unmerged")
    states = {
        "a" * 64: AdapterState("gpu", 100, num_running=2),
        "b" * 64: AdapterState("host", 100, num_waiting=3),
        "d" * 64: AdapterState("gpu", 100, num_running=1),  # retired, still draining
    }
    stats = EngineStats(
        num_running=4, num_waiting=3, num_base_running=1, kv_blocks_used=25, kv_blocks_total=100, adapter_bytes_used=200,
        adapter_bytes_total=1000, host_bytes_used=100, num_preemptions=7, prefix_hit_tokens=10, prefix_query_tokens=40,
        adapters=states,
    )  # fmt: skip
    load = AdapterLoad("a" * 64, "host_to_gpu", seconds=0.003, num_bytes=100)
    metrics.on_report(StepReport(step_s=0.002, num_decode_tokens=4, stats=stats, loads=(load,)))
    metrics.on_report(StepReport(step_s=0.05, num_prefill_tokens=60, num_decode_tokens=3))
    samples = samples_of(metrics.render().decode())
    assert value(samples, "loraplex_requests_running", adapter="base") == 1
    assert value(samples, "loraplex_requests_running", adapter="hot") == 2
    assert value(samples, "loraplex_requests_running", adapter="other") == 1
    assert value(samples, "loraplex_requests_waiting", adapter="warm") == 3
    assert value(samples, "loraplex_adapters", residency="gpu") == 2
    assert value(samples, "loraplex_adapters", residency="host") == 1
    assert value(samples, "loraplex_adapters", residency="disk") == 1
    assert value(samples, "loraplex_adapter_memory_bytes", tier="host") == 100
    assert value(samples, "loraplex_kv_usage_ratio") == 0.25
    assert value(samples, "loraplex_preemptions_total") == 7
    assert value(samples, "loraplex_step_seconds_count", variant="base", kind="decode") == 1
    assert value(samples, "loraplex_step_seconds_count", variant="base", kind="prefill") == 1
    assert value(samples, "loraplex_step_tokens_total", kind="decode") == 7
    assert value(samples, "loraplex_adapter_load_seconds_sum", step="host_to_gpu") == 0.003
    assert value(samples, "loraplex_adapter_load_bytes_total", step="host_to_gpu") == 100
    assert value(samples, "vllm:num_requests_running", model_name="tiny") == 4
    assert value(samples, "vllm:num_requests_waiting", model_name="tiny") == 3
    assert value(samples, "vllm:kv_cache_usage_perc", model_name="tiny") == 0.25
    labels = {"max_lora": "10", "running_lora_adapters": "hot", "waiting_lora_adapters": "warm,warm-too"}
    assert value(samples, "vllm:lora_requests_info", **labels) > 1.7e9


@pytest.fixture
def http(tmp_path: Path, decoder: Decoder) -> Iterator[httpx.Client]:
    with live_server(tmp_path / "data", decoder) as server, server.http() as http:
        yield http


def test_a_live_server(http: httpx.Client, tmp_path: Path, decoder: Decoder) -> None:
    packed = zipped(save_adapter(tmp_path / "poet", decoder.base_shape))
    http.post("/v1/adapters", data={"name": "poet"}, files={"file": ("a.zip", io.BytesIO(packed))})
    for model in ("poet", "tiny"):
        body = {"model": model, "prompt": "CANARY-7f3a", "max_tokens": 5, "temperature": 0}
        assert http.post("/v1/completions", json=body).status_code == 200
    answer = http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = samples_of(answer.text)
    assert value(samples, "loraplex_output_tokens_total", adapter="poet", mode="unmerged") == 5
    assert value(samples, "loraplex_time_to_first_token_seconds_count", adapter="poet", mode="unmerged") == 1
    # Tokens that come with the first one have no gap of their own.
    assert 1 <= value(samples, "loraplex_inter_token_seconds_count", adapter="base", mode="base") <= 4
    assert value(samples, "loraplex_adapter_load_seconds_count", step="disk_to_host") == 1
    assert value(samples, "loraplex_adapters", residency="gpu") == 1
    assert "process_resident_memory_bytes" in answer.text
    assert "CANARY" not in answer.text

    http.delete("/v1/adapters/poet")
    wait_until(lambda: 'residency="gpu"} 0.0' in http.get("/metrics").text)
    assert "poet" not in http.get("/metrics").text


@pytest.mark.parametrize(("level", "expected"), [(Access.OPEN, 200), (Access.USER, 401), (None, 404)])
def test_who_may_scrape(tmp_path: Path, decoder: Decoder, level: Access | None, expected: int) -> None:
    services = replace(live_services(tmp_path, decoder, keys=Keys(user=("user",))), metrics_access=level)
    with serve(services) as server, server.http() as http:
        answer = http.get("/metrics")
        with_key = http.get("/metrics", headers={"authorization": "Bearer user"})
    assert with_key.status_code == (404 if level is None else 200)
    # A path without a route says so to holders of a key only.
    assert answer.status_code == (401 if level is None else expected)
