"""Twenty seconds of everything at once, from a seed; afterwards the server is as it was."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.e2e.making import unique
from tests.e2e.serving import ADMIN_KEY, ANSWERS, BASE, QUESTION, ServerProcess, chat_body, long_body

pytestmark = [pytest.mark.e2e, pytest.mark.anyio]

SECONDS = 20.0
SEED = 20_26
# What a request may honestly be answered while adapters come and go.
EXPECTED = {200, 201, 400, 404, 409, 429}
UNHARMED_BYTES = 200 << 20


@dataclass
class Traffic:
    """Random users of one server; ``statuses`` counts what they were answered, ``wrong`` keeps wrong answers."""

    server: ServerProcess
    folders: list[Path]
    until: float
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def asks(self, rng: random.Random) -> None:
        """Chats whose right answer is known."""
        async with self.server.async_client() as user:
            while time.monotonic() < self.until:
                model = rng.choice([*ANSWERS, "gone", f"soak-{rng.randrange(3)}"])
                fields = {"n": rng.choice([1, 2]), "stream": False, "logprobs": rng.random() < 0.3}
                answer = await user.post("/v1/chat/completions", json=chat_body(model, QUESTION, **fields))
                self.statuses["chat", answer.status_code] += 1
                if answer.status_code == 200 and model in ANSWERS:
                    texts = {choice["message"]["content"] for choice in answer.json()["choices"]}
                    self.wrong += [f"{model}: {text}" for text in texts - {ANSWERS[model]}]

    async def leaves(self, rng: random.Random) -> None:
        """Long requests, streamed or not, given up at a random moment."""
        while time.monotonic() < self.until:
            async with self.server.async_client() as user:
                model = rng.choice([BASE, "shout", f"soak-{rng.randrange(3)}"])
                body = long_body(model, 800, n=rng.choice([1, 3]), temperature=1.5)
                try:
                    async with asyncio.timeout(rng.random()):
                        if rng.random() < 0.5:
                            await user.post("/v1/chat/completions", json=body)
                        else:
                            async with user.stream(
                                "POST", "/v1/chat/completions", json={**body, "stream": True}
                            ) as answer:
                                self.statuses["stream", answer.status_code] += 1
                                async for _ in answer.aiter_bytes():
                                    pass
                except TimeoutError:
                    self.statuses["left", 200] += 1

    async def changes(self, rng: random.Random) -> None:
        """Uploads, replacements, pins and deletes of three names."""
        async with self.server.async_client(ADMIN_KEY) as admin:
            while time.monotonic() < self.until:
                name, what = f"soak-{rng.randrange(3)}", rng.random()
                if what < 0.5:
                    folder = rng.choice(self.folders)
                    files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
                    form = {"name": name, "replace": rng.choice(["true", "false"])}
                    answer = await admin.post("/v1/adapters", data=form, files=files)
                elif what < 0.8:
                    answer = await admin.delete(f"/v1/adapters/{name}", params={"timeout": 20})
                elif what < 0.9:
                    answer = await admin.patch(f"/v1/adapters/{name}", json={"pinned": rng.random() < 0.3})
                else:
                    answer = await admin.get("/v1/adapters")
                self.statuses["admin", answer.status_code] += 1
                await asyncio.sleep(rng.random() * 0.1)

    async def blunders(self, rng: random.Random) -> None:
        """Bodies that cannot be served, and uploads that break off."""
        async with self.server.async_client(ADMIN_KEY) as admin:
            while time.monotonic() < self.until:
                size = rng.randrange(2000)
                content = rng.choice([b"{", b"[]", b"", rng.randbytes(size)])
                path = rng.choice(["/v1/chat/completions", "/v1/adapters", "/v1/completions", "/tokenize"])
                kind = rng.choice(["application/json", "multipart/form-data; boundary=x", "text/plain"])
                answer = await admin.post(path, content=content, headers={"content-type": kind})
                self.statuses["blunder", answer.status_code] += 1
                await asyncio.sleep(rng.random() * 0.1)


async def test_after_a_soak_the_server_is_healthy_and_empty(server: ServerProcess, tmp_path: Path) -> None:
    folders = [unique(tmp_path / f"a{number}", seed=100 + number, name="json") for number in range(4)]
    names = {card["id"] for card in server.user.get("/v1/models").json()["data"]}
    memory = server.metric("loraplex_adapter_memory_bytes", tier="gpu")
    for model in ANSWERS:
        server.answer(model)
    before = server.rss_bytes()
    traffic = Traffic(server, folders, time.monotonic() + SECONDS)
    kinds = [traffic.asks] * 4 + [traffic.leaves] * 4 + [traffic.changes] * 2 + [traffic.blunders]
    users = [kind(random.Random(SEED + number)) for number, kind in enumerate(kinds)]
    await asyncio.wait_for(asyncio.gather(*users), SECONDS + 40)

    assert not traffic.wrong
    unexpected = {key: count for key, count in traffic.statuses.items() if key[1] >= 500 or key[1] == 429}
    assert not unexpected, traffic.statuses
    assert {status for kind, status in traffic.statuses if kind != "blunder"} <= EXPECTED
    assert traffic.statuses["chat", 200] > 20
    for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting", "loraplex_kv_blocks_used"):
        server.until(gauge, 0)
    for number in range(3):
        server.admin.patch(f"/v1/adapters/soak-{number}", json={"pinned": False})
        assert server.admin.delete(f"/v1/adapters/soak-{number}").status_code in (200, 404)
    assert {card["id"] for card in server.user.get("/v1/models").json()["data"]} == names
    server.until("loraplex_adapter_memory_bytes", memory, tier="gpu")
    assert server.rss_bytes() < before + UNHARMED_BYTES
    assert not any((server.data_dir / "incoming").iterdir())
    assert server.user.get("/ready").status_code == 200
    for model, answer in ANSWERS.items():
        assert server.answer(model) == answer
    errors = [line for line in server.log() if line.get("level") in ("error", "critical") or "text" in line]
    assert not errors
