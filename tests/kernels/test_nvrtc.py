"""Kernels compiled at run time: where machine code is kept, on the CPU."""

import json
import re
import sys
from pathlib import Path

import pytest

from loraplex_server.kernels import nvrtc_build


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """What a stand-in compiler was asked for; machine code is kept under ``tmp_path``."""
    calls: list[tuple[str, tuple[str, ...]]] = []

    def compile_(source: str, options: list[str]) -> bytes:
        calls.append((source, tuple(options)))
        return f"{source} {' '.join(options)}".encode()

    monkeypatch.setattr(nvrtc_build, "_compile", compile_)
    monkeypatch.setattr(nvrtc_build, "compiler_version", lambda: "13.0")
    monkeypatch.setenv("LORAPLEX_CACHE_DIR", str(tmp_path))
    return calls


def test_machine_code_is_built_once(compiled: list[tuple[str, tuple[str, ...]]]) -> None:
    first = nvrtc_build.build("nf4_mma.cu", {"MT": 1}, "sm_90a")
    assert nvrtc_build.build("nf4_mma.cu", {"MT": 1}, "sm_90a") == first
    assert compiled == [("nf4_mma.cu", ("--gpu-architecture=sm_90a", "--std=c++17", "-DMT=1"))]


def test_everything_that_changes_the_code_changes_its_name(
    compiled: list[tuple[str, tuple[str, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvrtc_build.build("nf4_mma.cu", {"MT": 1}, "sm_90a")
    nvrtc_build.build("nf4_mma.cu", {"MT": 2}, "sm_90a")
    nvrtc_build.build("nf4_mma.cu", {"MT": 1}, "sm_100a")
    nvrtc_build.build("nf4_ring.cu", {"MT": 1}, "sm_90a")
    monkeypatch.setattr(nvrtc_build, "compiler_version", lambda: "13.1")
    nvrtc_build.build("nf4_mma.cu", {"MT": 1}, "sm_90a")
    monkeypatch.setattr(nvrtc_build, "_read", lambda name: f"another {name}")
    nvrtc_build.build("nf4_mma.cu", {"MT": 1}, "sm_90a")
    assert len(compiled) == 6


def test_what_is_missing_is_built_in_processes_side_by_side(
    compiled: list[tuple[str, tuple[str, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[nvrtc_build.Build]] = []

    class Process:
        """Stands in for a process: it builds at once."""

        def __init__(self, command: list[str], **_: object) -> None:
            assert command[:3] == [sys.executable, "-m", "loraplex_server.kernels.nvrtc_build"]
            asked.append([nvrtc_build.Build(s, tuple(map(tuple, d)), a) for s, d, a in json.loads(command[3])])
            for source, defines, arch in asked[-1]:
                nvrtc_build.build(source, dict(defines), arch)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(nvrtc_build.subprocess, "Popen", Process)
    monkeypatch.setattr(nvrtc_build.os, "cpu_count", lambda: 2)
    nvrtc_build.build("nf4_mma.cu", {"MT": 2, "A": 1}, "sm_90a")
    wanted = {nvrtc_build.Build("nf4_mma.cu", (("A", 1), ("MT", i)), "sm_90a") for i in range(4)}
    nvrtc_build.build_all(wanted)
    assert sorted(each for share in asked for each in share) == sorted(b for b in wanted if ("MT", 2) not in b.defines)
    assert len(asked) == 2
    nvrtc_build.build_all(wanted)
    assert len(asked) == 2
    assert len(compiled) == 4


def test_a_cache_that_cannot_be_written_costs_only_time(
    compiled: list[tuple[str, tuple[str, ...]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("LORAPLEX_CACHE_DIR", str(blocker))
    for _ in range(2):
        assert nvrtc_build.build("nf4_mma.cu", {"MT": 1}, "sm_90a")
    assert len(compiled) == 2


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert nvrtc_build.cache_dir() == Path("/a/kernels")
    monkeypatch.delenv("LORAPLEX_CACHE_DIR")
    assert nvrtc_build.cache_dir() == Path("/b/loraplex/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert nvrtc_build.cache_dir() == Path.home() / ".cache/loraplex/kernels"


def test_every_included_header_ships() -> None:
    sources = sorted(nvrtc_build.SOURCE_DIR.glob("*.cu*"))
    assert len(sources) > 3
    for source in sources:
        for header in re.findall(r'#include "([^"]+)"', source.read_text()):
            assert (nvrtc_build.SOURCE_DIR / header).is_file(), (source.name, header)
