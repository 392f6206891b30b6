"""P4: header and shape bombs are refused before memory is taken. P5: a config can neither run nor hang anything."""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex_adapters import format as adapter_format
from loraplex_adapters.base import BaseShape
from loraplex_adapters.errors import AdapterError
from loraplex_adapters.header import MAX_HEADER_BYTES, MAX_TENSORS, read_header
from loraplex_adapters.patterns import MAX_AUTOMATA, MAX_PATTERNS, MAX_QUANTIFIERS, ModulePatterns
from tests.adapters.making import CONFIG, WEIGHTS, edit_config, save_random, tiny_base


def write_weights(path: Path, header: Any, data_bytes: int = 0) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data_bytes))
    return path


def tensor(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BOMBS: dict[str, tuple[Any, int, str]] = {
    "header of 99 MB announced": (struct.pack("<Q", 99 << 20), 0, "header_too_large"),
    "1e5 tensors": ({str(i): [] for i in range(100_000)}, 0, "header_too_large"),
    "too many tensors": ({str(i): 0 for i in range(MAX_TENSORS + 1)}, 0, "too_many_tensors"),
    "1e18 elements": ({"x": tensor([10**9, 10**9], 0, 16)}, 16, "weights_broken"),
    "shape that wraps around": ({"x": tensor([2**32, 2**32, 4], 0, 0)}, 0, "weights_broken"),
    "offsets beyond 64 bits": ({"x": tensor([4], 2**70, 2**70 + 16)}, 16, "weights_broken"),
    "negative shape": ({"x": tensor([-2, -2], 0, 16)}, 16, "weights_broken"),
    "float shape": ({"x": tensor([4.0], 0, 16)}, 16, "weights_broken"),
    "boolean shape": ({"x": tensor([True], 0, 4)}, 4, "weights_broken"),
    "many dimensions": ({"x": tensor([1] * 100, 0, 4)}, 4, "weights_broken"),
    "overlap": ({"x": tensor([4], 0, 16), "y": tensor([4], 8, 24)}, 24, "weights_broken"),
    "same bytes twice": ({"x": tensor([4], 0, 16), "y": tensor([4], 0, 16)}, 16, "weights_broken"),
    "gap": ({"x": tensor([4], 16, 32)}, 32, "weights_broken"),
    "end before begin": ({"x": tensor([0], 16, 0)}, 16, "weights_broken"),
    "short file": ({"x": tensor([4], 0, 16)}, 15, "weights_broken"),
    "long file": ({"x": tensor([4], 0, 16)}, 17, "weights_broken"),
    "missing offsets": ({"x": {"dtype": "F32", "shape": [1]}}, 4, "weights_broken"),
    "not an object": ([1], 0, "weights_broken"),
    "not JSON": (b"{" * 1000, 0, "weights_broken"),
    "deep JSON": (b"[" * 500_000, 0, "weights_broken"),
    "long number": (b'{"x":' + b"9" * 100_000 + b"}", 0, "weights_broken"),
    "name twice": (b'{"x":1,"x":1}', 0, "weights_broken"),
    "long name": ({"x" * 1000: tensor([4], 0, 16)}, 16, "weights_broken"),
    "strange metadata": ({"__metadata__": 1}, 0, "weights_broken"),
}


@pytest.mark.parametrize(("header", "data_bytes", "code"), BOMBS.values(), ids=BOMBS.keys())
def test_header_and_shape_bombs_are_refused(tmp_path: Path, header: Any, data_bytes: int, code: str) -> None:
    path = write_weights(tmp_path / WEIGHTS, header, data_bytes)
    if code == "header_too_large" and isinstance(header, bytes):
        path.write_bytes(header + b"{" + bytes(100))

    with pytest.raises(AdapterError) as refusal:
        read_header(path)

    assert refusal.value.code == code
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("size", range(9))
def test_files_shorter_than_their_header_are_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / WEIGHTS
    path.write_bytes(b"\x02\0\0\0\0\0\0\0{"[:size])

    with pytest.raises(AdapterError):
        read_header(path)


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    """A process limited to 32 MiB above what its imports take refuses the largest allowed header and a huge shape."""
    sparse = tmp_path / "sparse.safetensors"
    write_weights(sparse, {"x": tensor([1 << 20, 1 << 12], 0, 1 << 34)})
    with sparse.open("r+b") as file:
        file.truncate((1 << 33) + 8)
    full = b"{" + b",".join(b'"%d":[[[[]]]]' % i for i in range(MAX_TENSORS * 2))
    write_weights(tmp_path / "full.safetensors", full.ljust(MAX_HEADER_BYTES - 1) + b"}")
    with (tmp_path / "announced.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 99 << 20) + b"{")
        file.truncate(100 << 20)
    code = """
import resource, sys
from pathlib import Path
from loraplex_adapters.errors import AdapterError
from loraplex_adapters.header import read_header
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        read_header(Path(name))
    except AdapterError as error:
        print(error.code)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    files = [str(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    result = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)

    *codes, grown_kib = result.stdout.split()
    assert codes == ["header_too_large", "too_many_tensors", "weights_broken"]
    assert int(grown_kib) < 32 * 1024


HOSTILE_PATTERNS = [
    "(a+)+$",
    "(.*)*",
    "((a|a)+)+b",
    "(.*a){20}",
    "(x+x+)+y",
    ".*.*.*.*.*.*.*.*.*.*=",
    "(?=.*){9}",
    "[" * 200,
]

any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(HOSTILE_PATTERNS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
keys = st.sampled_from(
    [
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "bias",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "use_dora",
        "modules_to_save",
        "auto_mapping",
        "trainable_token_indices",
        "loftq_config",
        "base_model_name_or_path",
        "unknown",
        "runtime_config",
    ]
)
mutations = st.dictionaries(keys, any_json, min_size=1, max_size=4)
pattern_mutations = st.fixed_dictionaries(
    {},
    optional={
        "rank_pattern": st.dictionaries(
            st.sampled_from(HOSTILE_PATTERNS) | st.text(max_size=30), st.just(2), max_size=4
        ),
        "alpha_pattern": st.dictionaries(
            st.sampled_from(HOSTILE_PATTERNS) | st.text(max_size=30), any_json, max_size=4
        ),
    },
)


@settings(max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=mutations | pattern_mutations)
def test_mutated_configs_are_read_or_refused_at_once(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tmp_path / "mutated"
    if not folder.exists():
        save_random(folder)
    original = (folder / CONFIG).read_text()
    refusal = ""
    try:
        weights = adapter_format.read(edit_config(folder, **changes), tiny_base())
        assert weights.max_rank == 2
    except AdapterError as error:
        refusal = str(error)
    finally:
        (folder / CONFIG).write_text(original)
    assert len(refusal) < 1000


@settings(max_examples=200, deadline=5000)
@given(raw=st.binary(max_size=200))
def test_random_headers_are_refused_with_our_errors(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write_weights(tmp_path_factory.getbasetemp() / "random.safetensors", raw)
    try:
        tensors = read_header(path)
    except AdapterError:
        return
    assert tensors == {}


def test_the_slowest_allowed_patterns_stay_fast() -> None:
    """The most patterns that are taken, each as slow as can be, on as many modules as Llama-3.1-8B has."""
    slow = [f"{'.*' * MAX_QUANTIFIERS}{'.' * 9}{i}b" for i in range(MAX_AUTOMATA)]
    slow += [f"{'.' * 20}{i:04}{'.' * 12}z" for i in range(MAX_PATTERNS - MAX_AUTOMATA)]
    patterns = ModulePatterns(slow)
    paths = [f"model.layers.{layer}.self_attn.q_proj{i}" for layer in range(32) for i in range(7)]

    started = time.perf_counter()
    assert not any(patterns.first(path) for path in paths)
    assert time.perf_counter() - started < 10


def test_a_hanging_target_regex_is_never_run(folder: Path, base: BaseShape) -> None:
    edit_config(save_random(folder), target_modules="(m|mo|mod|.*)*" * 500 + "$$", exclude_modules="((.*)*)*x")

    started = time.perf_counter()
    adapter_format.read(folder, base)
    assert time.perf_counter() - started < 1
