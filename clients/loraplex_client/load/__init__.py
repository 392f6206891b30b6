"""A load generator for any OpenAI-compatible server: closed or open loop, mixes of models, latencies as a user has them."""

from .generator import Progress, run_load
from .lengths import Lengths
from .mix import Mix
from .plan import LoadPlan, Slo
from .result import LoadResult, RequestRecord
from .summary import LoadSummary, Percentiles, percentile, summarize

__all__ = [
    "Lengths",
    "LoadPlan",
    "LoadResult",
    "LoadSummary",
    "Mix",
    "Percentiles",
    "Progress",
    "RequestRecord",
    "Slo",
    "percentile",
    "run_load",
    "summarize",
]
