"""How the fused NF4 GEMM is cut for a shape: a measured table for known shapes, a rule for all others."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

TABLE_BYTES = 65536
SHARED_BYTES = 227 * 1024  # what one CTA may use on Hopper
UNIT_TILE_BYTES = 544  # a tile of 16 rows x 64 k: codes and scales
MAX_ROWS = 64
MMA_MAX_ROWS = 16


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class MmaConfig:
    """Parameters of ``nf4_mma.cu``: the macro names in lower case."""

    r: int
    wr: int
    wk: int
    cl: int = 1
    p: int = 2
    dx: int = 1
    xch: int = 1

    def num_units(self, k_blocks: int) -> int:
        """k blocks of one warp."""
        return _ceil(_ceil(k_blocks, self.cl), self.wk)

    def grid(self, row_blocks: int) -> int:
        """CTAs of a launch."""
        return _ceil(row_blocks * 4, self.r * self.wr) * self.cl

    @property
    def block(self) -> int:
        """Threads of a CTA."""
        return self.wr * self.wk * 32

    def receive_offset(self, m: int, k_blocks: int) -> int:
        """Where the cluster's partial sums lie in shared memory: behind everything else."""
        tokens = _ceil(m, 8) * 8
        x = self.wr * self.wk * self.p * tokens * 128 if self.dx else m * (_ceil(k_blocks, self.cl) * 128 + 16)
        sums = self.wk * tokens * (self.wr * self.r * 16 + 4) * 4
        return _ceil(max(TABLE_BYTES + x + 8 * self.xch, sums), 128) * 128

    def shared_bytes(self, m: int, k_blocks: int) -> int:
        """Dynamic shared memory of a CTA."""
        received = _ceil(m, 8) * 8 * self.wr * self.r * 16 * 4 if self.cl > 1 else 0
        return self.receive_offset(m, k_blocks) + received

    def valid(self, m: int, row_blocks: int, k_blocks: int) -> bool:
        """Whether the kernel can run so."""
        return (
            self.block <= 1024
            and self.shared_bytes(m, k_blocks) <= SHARED_BYTES
            and _ceil(k_blocks, self.cl) * (self.cl - 1) < k_blocks
            and (self.wr * self.r * 4) % self.cl == 0
        )


@dataclass(frozen=True)
class WgmmaConfig:
    """Parameters of ``nf4_wgmma.cu``: the macro names in lower case."""

    wr: int
    wk: int = 1
    split: int = 1
    p: int = 4
    xc: int = 4
    nbuf: int = 3
    ab: int = 1

    def num_units(self, k_blocks: int) -> int:
        """k blocks of one warpgroup."""
        return _ceil(_ceil(k_blocks, self.split), self.wk)

    def grid(self, row_blocks: int) -> int:
        """CTAs of a launch."""
        return _ceil(row_blocks, self.wr) * self.split

    @property
    def block(self) -> int:
        """Threads of a CTA."""
        return self.wr * self.wk * 128

    def shared_bytes(self, m: int, k_blocks: int) -> int:
        """Dynamic shared memory of a CTA; 1,024 bytes allow for alignment."""
        tokens = _ceil(m, 8) * 8
        chunks = _ceil(_ceil(k_blocks, self.split), self.xc)
        x = min(chunks, self.nbuf) * self.xc * tokens * 128
        sums = self.wk * tokens * (self.wr * 64 + 4) * 4
        return max(TABLE_BYTES + x, sums)

    def workspace_floats(self, m: int, row_blocks: int) -> int:
        """float32 values of split sums."""
        return self.grid(row_blocks) * _ceil(m, 8) * 8 * self.wr * 64 if self.split > 1 else 0

    def valid(self, m: int, row_blocks: int, k_blocks: int, num_sms: int) -> bool:
        """Whether the kernel can run so; CTAs of a split wait for each other, so all must fit at once."""
        return (
            self.block <= 512
            and self.shared_bytes(m, k_blocks) <= SHARED_BYTES
            and _ceil(k_blocks, self.split) * (self.split - 1) < k_blocks
            and self.xc % self.wk == 0
            and (self.split == 1 or self.grid(row_blocks) <= num_sms)
        )


Config = MmaConfig | WgmmaConfig

# (N, K) -> token tiles of 8 -> configuration, measured on one H200 (benchmarks/kernels.py sweep).
MEASURED: dict[tuple[int, int], dict[int, Config]] = {
    (6144, 4096): {
        1: MmaConfig(r=2, cl=2, wr=3, wk=4, p=2),
        2: MmaConfig(r=2, cl=2, wr=3, wk=4, p=2),
        4: WgmmaConfig(wr=3, split=4, p=4, xc=16, nbuf=2, ab=2),
        8: WgmmaConfig(wr=3, split=4, p=4, xc=4, nbuf=3, ab=2),
    },
    (4096, 4096): {
        1: MmaConfig(r=2, wr=1, wk=8, p=2),
        2: MmaConfig(r=2, wr=1, wk=8, p=2),
        4: WgmmaConfig(wr=2, wk=2, split=4, p=4, xc=16, nbuf=2, ab=2),
        8: WgmmaConfig(wr=2, wk=2, split=4, p=4, xc=16, nbuf=2),
    },
    (28672, 4096): {
        1: MmaConfig(r=2, wr=7, wk=2, p=3, dx=0, xch=4),
        2: MmaConfig(r=4, wr=7, wk=1, cl=2, p=2, dx=0, xch=4),
        4: WgmmaConfig(wr=4, p=8, xc=8, nbuf=2, ab=2),
        8: WgmmaConfig(wr=4, p=4, xc=4, nbuf=2),
    },
    (4096, 14336): {
        1: MmaConfig(r=2, wr=1, wk=16, p=2),
        2: MmaConfig(r=4, wr=1, wk=8, cl=2, p=2),
        4: WgmmaConfig(wr=4, split=8, p=8, xc=4, nbuf=2, ab=2),
        8: WgmmaConfig(wr=4, split=8, p=4, xc=4, nbuf=2),
    },
}


def token_tiles(m: int, *, wgmma: bool) -> int:
    """Tiles of 8 tokens that the kernel for ``m`` rows is compiled for."""
    tiles = _ceil(m, 8)
    if m <= MMA_MAX_ROWS or not wgmma:
        return tiles
    return next(size for size in (3, 4, 6, 8) if tiles <= size)


@functools.cache
def choose(n: int, k: int, m: int, num_sms: int, *, wgmma: bool) -> Config:
    """The configuration for ``m`` rows (1-64) of a [n, k] matrix.

    ``wgmma``: whether the device has Hopper's warpgroup instructions.
    """
    row_blocks, k_blocks, tiles = _ceil(n, 64), k // 64, token_tiles(m, wgmma=wgmma)
    known = MEASURED.get((n, k), {})
    config = known.get(tiles) or (known.get({3: 4, 6: 8}.get(tiles, 0)))
    rows = tiles * 8
    if isinstance(config, MmaConfig) and config.valid(rows, row_blocks, k_blocks):
        return config
    if isinstance(config, WgmmaConfig) and wgmma and config.valid(rows, row_blocks, k_blocks, num_sms):
        return config
    if wgmma and m > MMA_MAX_ROWS:
        return min(
            _wgmma_configs(rows, row_blocks, k_blocks, num_sms), key=lambda c: _cost(c, row_blocks, k_blocks, num_sms)
        )
    return min(_mma_configs(rows, row_blocks, k_blocks), key=lambda c: _cost(c, row_blocks, k_blocks, num_sms))


def _cost(config: Config, row_blocks: int, k_blocks: int, num_sms: int) -> float:
    """Bytes that the busiest multiprocessor reads, weighted by what keeps it from reading at full speed."""
    tile_rows = config.wr * (config.r if isinstance(config, MmaConfig) else 4)
    waves = _ceil(config.grid(row_blocks), num_sms)
    work = waves * tile_rows * config.num_units(k_blocks) * config.wk * UNIT_TILE_BYTES
    in_flight = tile_rows * config.wk * min(config.p, config.num_units(k_blocks)) * UNIT_TILE_BYTES
    starved = math.sqrt(max(1.0, 32768 / in_flight))
    shared = (config.cl if isinstance(config, MmaConfig) else config.split) > 1
    return work * starved + 1500 * config.wk + 20000 * shared


def _mma_configs(m: int, row_blocks: int, k_blocks: int) -> Iterator[MmaConfig]:
    for r in (1, 2, 4) if m <= 8 else (1, 2):
        for wr in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16):
            for wk in (1, 2, 4, 8, 16):
                if not 4 <= wr * wk <= 16:
                    continue
                for cl in (1, 2):
                    # Warps that share rows of x read it from shared memory; others stream what they alone need.
                    for dx in (0, 1) if wr > 2 else (1,):
                        config = MmaConfig(
                            r=r, wr=wr, wk=wk, cl=cl, p=2 if wr * wk > 8 else 4, dx=dx, xch=1 if dx else 2
                        )
                        if config.valid(m, row_blocks, k_blocks):
                            yield config


def _wgmma_configs(m: int, row_blocks: int, k_blocks: int, num_sms: int) -> Iterator[WgmmaConfig]:
    for wr in (1, 2, 3, 4):
        for wk in (1, 2, 4):
            for split in (1, 2, 3, 4, 6, 8):
                config = WgmmaConfig(wr=wr, wk=wk, split=split, p=4, xc=max(4, wk))
                if wr * wk <= 4 and config.valid(m, row_blocks, k_blocks, num_sms):
                    yield config
