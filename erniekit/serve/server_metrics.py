"""What a server measures, under vLLM's names with the prefix `erniekit:`. Times are of the monotonic clock."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from erniekit.serve.server_engine import EngineThread

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_LABEL = ("model_name",)


class _Gauges(Collector):
    """What is read from the engine when someone asks. Its counters are those of drafts (num_speculative_tokens)."""

    def __init__(self, thread: EngineThread, name: str) -> None:
        self._thread, self._name = thread, name

    def collect(self) -> Iterator[Metric]:
        for name, text, value in (
            ("num_requests_running", "Answers that are read or generated.", self._thread.num_running),
            ("num_requests_waiting", "Answers that wait for one to end.", self._thread.num_waiting),
            ("kv_cache_usage_perc", "The used share of the room for running answers, 0 to 1.", self._thread.kv_usage),
        ):
            gauge = GaugeMetricFamily(f"erniekit:{name}", text, labels=_LABEL)
            gauge.add_metric([self._name], value)
            yield gauge
        drafting = self._thread.engine.drafting
        if drafting is not None:
            for name, text, value in (
                ("spec_decode_num_draft_tokens", "Drafted tokens that were checked.", drafting.num_drafts),
                ("spec_decode_num_accepted_tokens", "Drafted tokens that were right.", drafting.num_accepted),
            ):
                counter = CounterMetricFamily(f"erniekit:{name}", text, labels=_LABEL)
                counter.add_metric([self._name], value)
                yield counter


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, thread: EngineThread, name: str) -> None:
        self._registry, self._name = CollectorRegistry(), name
        self._registry.register(_Gauges(thread, name))
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self.prefix_cache_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache."
        )
        self.prefix_cache_hits = self._counter("prefix_cache_hits", "Prompt tokens that the prefix cache held.")
        self.admission_rejections = self._counter("admission_rejections", "Requests refused by a full queue.")
        self.tool_calls_unreadable = self._counter(
            "tool_calls_unreadable", "Tool calls of the model that could not be read."
        )
        self._success = Counter(
            "erniekit:request_success", "Answers by their end.", (*_LABEL, "finished_reason"), registry=self._registry
        )
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "Until the first token.", _SECONDS)
        self.inter_token_latency = self._histogram("inter_token_latency_seconds", "Between two tokens.", _SECONDS)
        self.e2e_latency = self._histogram("e2e_request_latency_seconds", "Until the last token.", _SECONDS)
        self.queue_time = self._histogram("request_queue_time_seconds", "Until the prompt is read.", _SECONDS)
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "From the reading of the prompt to the first token.", _SECONDS
        )
        self.decode_time = self._histogram("request_decode_time_seconds", "From the first token to the last.", _SECONDS)
        self.inference_time = self._histogram(
            "request_inference_time_seconds", "From the reading of the prompt to the last token.", _SECONDS
        )
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.request_generation_tokens = self._histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.request_params_n = self._histogram("request_params_n", "Answers of a request.", (1, 2, 5, 10, 20, 128))
        self.request_params_max_tokens = self._histogram("request_params_max_tokens", "max_tokens.", _TOKENS)

    def ended(self, reason: str) -> None:
        """An answer has ended."""
        self._success.labels(self._name, reason).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"erniekit:{name}", text, _LABEL, registry=self._registry).labels(self._name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"erniekit:{name}", text, _LABEL, buckets=buckets, registry=self._registry).labels(self._name)
