"""How the fused NF4 GEMM is cut for a shape: a measured table for known shapes, a rule for all others."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

TABLE_BYTES = 65536
SHARED_BYTES = 227 * 1024  # what one CTA may use on Hopper
UNIT_BYTES = 2176  # a unit of 64 rows x 64 k: codes and scales
UNIT_TILE_BYTES = 544  # a tile of 16 rows x 64 k: codes and scales
MAX_ROWS = 64
MMA_MAX_ROWS = 16
_ROOM_BYTES = 16 * 1024  # of shared memory, left to what an epilogue needs


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
    def num_clustered(self) -> int:
        """CTAs of a cluster."""
        return self.cl

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
class RingConfig:
    """Parameters of ``nf4_ring.cu``: the macro names in lower case."""

    wr: int
    wk: int = 1
    split: int = 1
    share: int = 0
    xc: int = 4
    stages: int = 4

    @property
    def num_clustered(self) -> int:
        """CTAs of a cluster."""
        return 2 if self.share else 1

    def part_blocks(self, k_blocks: int) -> int:
        """k blocks of one CTA."""
        return _ceil(k_blocks, self.split * (2 if self.share == self.wr else 1))

    def num_units(self, k_blocks: int) -> int:
        """k blocks of one warpgroup."""
        return _ceil(self.part_blocks(k_blocks), self.wk)

    def grid(self, row_blocks: int) -> int:
        """CTAs of a launch."""
        pair = self.num_clustered
        return _ceil(row_blocks, pair * self.wr - self.share) * pair * self.split

    @property
    def block(self) -> int:
        """Threads of a CTA: those that multiply and a warpgroup that copies."""
        return self.wr * self.wk * 128 + 128

    def ring_bytes(self, m: int) -> int:
        """Shared memory of the stages and their barriers."""
        stage = _ceil(self.xc * _ceil(m, 8) * 1024 + self.wr * self.xc * UNIT_BYTES, 1024) * 1024
        return self.stages * (stage + 16) + 16

    def shared_bytes(self, m: int, k_blocks: int) -> int:
        """Dynamic shared memory of a CTA."""
        return TABLE_BYTES + self.ring_bytes(m) + _ceil(m, 8) * 8 * self.share * 256

    def workspace_floats(self, m: int, row_blocks: int) -> int:
        """float32 values of split sums."""
        return self.grid(row_blocks) * _ceil(m, 8) * 8 * self.wr * 64 if self.split > 1 else 0

    def valid(self, m: int, row_blocks: int, k_blocks: int, num_sms: int) -> bool:
        """Whether the kernel can run so; CTAs of a split wait for each other, so all must fit at once."""
        part = self.part_blocks(k_blocks)
        sums = self.wk * _ceil(m, 8) * 8 * (self.wr * 64 + 4) * 4
        return (
            self.block <= 640
            and sums <= TABLE_BYTES + self.ring_bytes(m)
            and self.shared_bytes(m, k_blocks) <= SHARED_BYTES
            and part * (_ceil(k_blocks, part) - 1) < k_blocks
            and _ceil(k_blocks, part) == self.split * (2 if self.share == self.wr else 1)
            and self.xc % self.wk == 0
            and (self.share in (0, self.wr) or (self.share < self.wr and part > self.xc))
            and (self.split == 1 or self.grid(row_blocks) <= num_sms)
        )


Config = MmaConfig | RingConfig

# (N, K) -> token tiles of 8 -> configuration, measured on one H200 (benchmarks/kernels.py sweep).
MEASURED: dict[tuple[int, int], dict[int, Config]] = {
    (6144, 4096): {
        1: MmaConfig(r=2, cl=2, wr=3, wk=4, p=2),
        2: RingConfig(wr=1, wk=4, xc=8, stages=4),
        3: RingConfig(wr=1, wk=4, xc=8, stages=3),
        4: RingConfig(wr=1, wk=4, xc=8, stages=3),
        6: RingConfig(wr=1, wk=4, xc=4, stages=4),
        8: RingConfig(wr=1, wk=3, xc=3, stages=5),
    },
    (4096, 4096): {
        1: MmaConfig(r=2, wr=1, wk=8, p=2),
        2: MmaConfig(r=2, wr=1, wk=8, p=2),
        3: RingConfig(wr=1, wk=4, share=1, xc=8, stages=3),
        4: RingConfig(wr=1, wk=4, share=1, xc=8, stages=3),
        6: RingConfig(wr=1, wk=4, share=1, xc=4, stages=4),
        8: RingConfig(wr=1, wk=3, share=1, xc=3, stages=4),
    },
    (28672, 4096): {
        1: MmaConfig(r=2, wr=7, wk=2, p=3, dx=0, xch=4),
        2: RingConfig(wr=4, share=1, xc=4, stages=3),
        3: RingConfig(wr=4, share=1, xc=4, stages=3),
        4: RingConfig(wr=4, share=1, xc=4, stages=3),
        6: RingConfig(wr=4, share=1, xc=2, stages=5),
        8: RingConfig(wr=4, share=1, xc=2, stages=4),
    },
    (4096, 14336): {
        1: MmaConfig(r=2, wr=1, wk=16, p=2),
        2: RingConfig(wr=1, wk=4, share=1, xc=8, stages=4),
        3: RingConfig(wr=1, wk=4, share=1, xc=8, stages=3),
        4: RingConfig(wr=1, wk=4, share=1, xc=8, stages=3),
        6: RingConfig(wr=1, wk=4, share=1, xc=4, stages=4),
        8: RingConfig(wr=1, wk=3, share=1, xc=3, stages=4),
    },
    (4608, 3584): {
        1: MmaConfig(r=2, cl=2, wr=3, wk=4, p=3),
        2: MmaConfig(r=2, cl=2, wr=3, wk=4, p=3),
    },
    (3584, 3584): {1: MmaConfig(r=2, wr=1, wk=8, p=4), 2: MmaConfig(r=2, wr=1, wk=8, p=4)},
    (37888, 3584): {
        1: MmaConfig(r=4, wr=9, wk=1, cl=2, p=2, dx=0, xch=2),
        2: MmaConfig(r=2, wr=10, wk=1, p=3, dx=0, xch=2),
    },
    (3584, 18944): {1: MmaConfig(r=2, wr=1, wk=8, p=3), 2: MmaConfig(r=2, wr=1, wk=8, p=2)},
    (2048, 1536): {1: MmaConfig(r=1, wr=1, wk=16, p=2), 2: MmaConfig(r=1, wr=1, wk=7, p=4)},
    (1536, 1536): {1: MmaConfig(r=1, wr=1, wk=16, p=2), 2: MmaConfig(r=1, wr=1, wk=7, p=4)},
    (17920, 1536): {
        1: MmaConfig(r=2, wr=5, wk=2, p=3, dx=0, xch=2),
        2: MmaConfig(r=2, wr=5, wk=3, p=2, dx=0, xch=2),
    },
    (1536, 8960): {1: MmaConfig(r=2, wr=1, wk=7, cl=2, p=4), 2: MmaConfig(r=2, wr=1, wk=8, cl=2, p=4)},
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
    row_blocks, k_blocks, rows = _ceil(n, 64), k // 64, token_tiles(m, wgmma=wgmma) * 8
    config = MEASURED.get((n, k), {}).get(rows // 8)
    if isinstance(config, MmaConfig) and config.valid(rows, row_blocks, k_blocks):
        return config
    if isinstance(config, RingConfig) and wgmma and config.valid(rows, row_blocks, k_blocks, num_sms):
        return config
    if wgmma and m > MMA_MAX_ROWS:
        rings = _ring_configs(rows, row_blocks, k_blocks, num_sms)
        return min(rings, key=lambda c: _ring_cost(c, rows, row_blocks, k_blocks, num_sms))
    return min(_mma_configs(rows, row_blocks, k_blocks), key=lambda c: _mma_cost(c, row_blocks, k_blocks, num_sms))


def with_room(config: RingConfig, m: int, k_blocks: int, num_bytes: int) -> RingConfig:
    """The configuration with fewer or smaller stages, so that a CTA has ``num_bytes`` of shared memory to spare."""
    while config.shared_bytes(m, k_blocks) + num_bytes > SHARED_BYTES and (config.stages > 2 or config.xc > config.wk):
        smaller = {"stages": config.stages - 1} if config.stages > 2 else {"xc": config.wk}
        config = replace(config, **smaller)
    return config


def _mma_cost(config: MmaConfig, row_blocks: int, k_blocks: int, num_sms: int) -> float:
    """Bytes that the busiest multiprocessor reads, weighted by what keeps it from reading at full speed.

    The start of a wave of CTAs takes as long as reading some 50,000 bytes.
    """
    tile_rows = config.wr * config.r
    waves = _ceil(config.grid(row_blocks), num_sms)
    work = waves * tile_rows * config.num_units(k_blocks) * config.wk * UNIT_TILE_BYTES
    in_flight = tile_rows * config.wk * min(config.p, config.num_units(k_blocks)) * UNIT_TILE_BYTES
    starved = math.sqrt(max(1.0, 32768 / in_flight))
    return work * starved + 50000 * waves + 1500 * config.wk + 20000 * (config.cl > 1)


def _mma_configs(m: int, row_blocks: int, k_blocks: int) -> Iterator[MmaConfig]:
    for r in (1, 2, 4) if m <= 8 else (1, 2):
        for wr in range(1, 17):
            for wk in (1, 2, 3, 4, 5, 8, 16):
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


def _ring_cost(config: RingConfig, m: int, row_blocks: int, k_blocks: int, num_sms: int) -> float:
    """Cycles: of a warpgroup's chain of units, which its neighbors lengthen, and of what joins partial sums."""
    waves = _ceil(config.grid(row_blocks), num_sms)
    unit = 200 + config.wr * config.wk * (60 + 1.25 * m)
    joining = 4000 * (config.split > 1) + 1500 * (config.share > 0) + 10 * m * (config.wk - 1)
    return waves * (5000 + unit * config.num_units(k_blocks)) + joining


def _ring_configs(m: int, row_blocks: int, k_blocks: int, num_sms: int) -> Iterator[RingConfig]:
    for wr, wk in ((1, 4), (2, 2), (4, 1), (1, 3), (3, 1), (1, 2), (2, 1), (1, 1)):
        for split in (1, 2, 3, 4, 6, 8):
            for share in {0, 1, wr}:
                for xc in (2 * wk, wk) if wk > 1 else (4, 2, 1):
                    stages = next((s for s in (8, 6, 5, 4, 3, 2) if _fits(wr, xc, s, share, m)), 0)
                    config = RingConfig(wr=wr, wk=wk, split=split, share=share, xc=xc, stages=stages)
                    if stages and (stages > 2 or xc == wk) and config.valid(m, row_blocks, k_blocks, num_sms):
                        yield config
                        break


def _fits(wr: int, xc: int, stages: int, share: int, m: int) -> bool:
    config = RingConfig(wr=wr, share=share, xc=xc, stages=stages)
    return config.shared_bytes(m, 1) + _ROOM_BYTES <= SHARED_BYTES
