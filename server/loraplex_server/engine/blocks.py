"""Paged KV blocks: a free list, and a prefix cache over the blocks nobody uses at the moment.

A full block is known by a hash chained from its predecessors and seeded with the adapter's digest and the tenant's
salt, so that neither another version of an adapter nor another tenant can ever reuse it.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Tokens

from loraplex_server.engine.sequence import Sequence

# Block 0 is never handed out: padded rows of a block table point to it.
NULL_BLOCK = 0


def _root_hash(adapter: str | None, salt: str) -> bytes:
    # The length prefix keeps (adapter, salt) pairs apart whatever the salt contains.
    name = (adapter or "").encode()
    return hashlib.blake2b(len(name).to_bytes(4, "big") + name + salt.encode(), digest_size=16).digest()


def _block_hash(parent: bytes, tokens: Tokens[int]) -> bytes:
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Hands out KV blocks to sequences and remembers what full blocks contain.

    Blocks in use are counted by reference; a block whose last user left keeps its content (and can be found again)
    until it is needed for something else, least recently used first.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks - 1
        self._prefix_cache = prefix_cache
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._users = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def attach_prefix(self, seq: Sequence) -> None:
        """Give a sequence without blocks the longest cached prefix of its tokens; sets ``num_computed``.

        At least one token stays to be computed, since its logits are wanted. Sequences that ask for the
        log-probabilities of their prompt compute all of it.
        """
        assert not seq.block_ids
        if not self._prefix_cache or seq.request.sampling.num_prompt_logprobs is not None:
            return
        found: list[int] = []
        self._extend_hashes(seq, len(seq.tokens) - 1)
        for block_hash in seq.block_hashes[: (len(seq.tokens) - 1) // self.block_size]:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        for block in found:
            self._acquire(block)
        seq.block_ids = found
        seq.num_computed = len(found) * self.block_size
        seq.num_published_blocks = len(found)

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for the first ``num_tokens`` tokens of a sequence; False (and nothing taken) if blocks lack."""
        missing = self.blocks_for(num_tokens) - len(seq.block_ids)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._take()
            self._users[block] = 1
            seq.block_ids.append(block)
        return True

    def commit(self, seq: Sequence) -> None:
        """Make the full blocks that a sequence has computed findable."""
        if not self._prefix_cache:
            return
        # The last computed token may not have reached the host yet.
        num_known = min(seq.num_computed, len(seq.tokens))
        num_full = num_known // self.block_size
        self._extend_hashes(seq, num_known)
        for i in range(seq.num_published_blocks, num_full):
            self._publish(seq.block_ids[i], seq.block_hashes[i])
        seq.num_published_blocks = num_full

    def release(self, seq: Sequence) -> None:
        """Take a sequence's blocks back; the content of full ones stays findable."""
        # Last block first: the head of a prefix is worth more than its tail and should be evicted later.
        for block in reversed(seq.block_ids):
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._hash_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        seq.block_ids = []
        seq.num_computed = 0
        seq.num_published_blocks = 0

    def forget(self) -> None:
        """Forget the content of all blocks; those in use stay with their users and are found by nobody else."""
        self._free += reversed(self._idle)
        self._idle.clear()
        self._hash_of.clear()
        self._block_of.clear()

    def _extend_hashes(self, seq: Sequence, num_tokens: int) -> None:
        size = self.block_size
        hashes = seq.block_hashes
        parent = hashes[-1] if hashes else _root_hash(seq.request.adapter, seq.request.salt)
        for i in range(len(hashes), num_tokens // size):
            parent = _block_hash(parent, seq.tokens[i * size : (i + 1) * size])
            hashes.append(parent)

    def _publish(self, block: int, block_hash: bytes) -> None:
        # Two sequences may compute the same content at once: the first one stays the one that is found.
        if block_hash in self._block_of or block in self._hash_of:
            return
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash

    def _unpublish(self, block: int) -> None:
        self._block_of.pop(self._hash_of.pop(block), None)

    def _acquire(self, block: int) -> None:
        self._idle.pop(block, None)
        self._users[block] += 1

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._idle.popitem(last=False)
        self._unpublish(block)
        return block
