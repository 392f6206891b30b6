"""The demo: a tiny base model, adapters for it, and the scripts that made and measured them."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

_HERE = Path(__file__).parent

DEMO_BASE_NAME = "loraplex-demo"
DEMO_MODEL = _HERE / "model"
DEMO_ADAPTERS_ROOT = _HERE / "adapters"
DEMO_RESULTS = _HERE / "results.json"

# Name -> PEFT directory. The demo serves all but the last from the start and uploads the last while it runs.
DEMO_ADAPTERS: Mapping[str, Path] = MappingProxyType(
    {name: DEMO_ADAPTERS_ROOT / name for name in ("shout", "json", "pirate", "emoji")}
)

PROMPTS: tuple[str, ...] = (
    "What is the capital of France?",
    "What does a cow say?",
    "What is 7 plus 5?",
    "What color is a banana?",
    "What is the opposite of hot?",
    "Which day comes after Monday?",
    "Who are you?",
)

__all__ = ["DEMO_ADAPTERS", "DEMO_ADAPTERS_ROOT", "DEMO_BASE_NAME", "DEMO_MODEL", "DEMO_RESULTS", "PROMPTS"]
