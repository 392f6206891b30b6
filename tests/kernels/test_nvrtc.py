"""Kernels compiled at run time: where machine code is kept, on the CPU."""

import re
from pathlib import Path

import pytest

from loraplex_server.kernels import nvrtc


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """What a stand-in compiler was asked for; machine code is kept under ``tmp_path``."""
    calls: list[tuple[str, tuple[str, ...]]] = []

    def compile_(source: str, options: list[str]) -> bytes:
        calls.append((source, tuple(options)))
        return f"{source} {' '.join(options)}".encode()

    monkeypatch.setattr(nvrtc, "_compile", compile_)
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: "13.0")
    monkeypatch.setenv("LORAPLEX_CACHE_DIR", str(tmp_path))
    return calls


def test_machine_code_is_built_once(compiled: list[tuple[str, tuple[str, ...]]]) -> None:
    first = nvrtc.build("nf4_mma.cu", {"MT": 1}, "sm_90a")
    assert nvrtc.build("nf4_mma.cu", {"MT": 1}, "sm_90a") == first
    assert compiled == [("nf4_mma.cu", ("--gpu-architecture=sm_90a", "--std=c++17", "-DMT=1"))]


def test_everything_that_changes_the_code_changes_its_name(
    compiled: list[tuple[str, tuple[str, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvrtc.build("nf4_mma.cu", {"MT": 1}, "sm_90a")
    nvrtc.build("nf4_mma.cu", {"MT": 2}, "sm_90a")
    nvrtc.build("nf4_mma.cu", {"MT": 1}, "sm_100a")
    nvrtc.build("nf4_wgmma.cu", {"MT": 1}, "sm_90a")
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: "13.1")
    nvrtc.build("nf4_mma.cu", {"MT": 1}, "sm_90a")
    monkeypatch.setattr(nvrtc, "_read", lambda name: f"another {name}")
    nvrtc.build("nf4_mma.cu", {"MT": 1}, "sm_90a")
    assert len(compiled) == 6


def test_a_cache_that_cannot_be_written_costs_only_time(
    compiled: list[tuple[str, tuple[str, ...]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("LORAPLEX_CACHE_DIR", str(blocker))
    for _ in range(2):
        assert nvrtc.build("nf4_mma.cu", {"MT": 1}, "sm_90a")
    assert len(compiled) == 2


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert nvrtc.cache_dir() == Path("/a/kernels")
    monkeypatch.delenv("LORAPLEX_CACHE_DIR")
    assert nvrtc.cache_dir() == Path("/b/loraplex/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert nvrtc.cache_dir() == Path.home() / ".cache/loraplex/kernels"


def test_every_included_header_ships() -> None:
    sources = sorted(nvrtc.SOURCE_DIR.glob("*.cu*"))
    assert len(sources) > 3
    for source in sources:
        for header in re.findall(r'#include "([^"]+)"', source.read_text()):
            assert (nvrtc.SOURCE_DIR / header).is_file(), (source.name, header)
