"""Adapters change while requests use them: each request keeps its version, and nothing is lost or held too long."""

import asyncio
import contextlib
import shutil
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from loraplex_server.demo import DEMO_ADAPTERS
from tests.e2e.making import WEIGHTS, unique
from tests.e2e.serving import ADMIN_KEY, ANSWERS, BASE, ServerProcess, chat_body, events, long_body, text_of

pytestmark = [pytest.mark.e2e, pytest.mark.anyio]

RUNNING = "vllm:num_requests_running"


async def lines_of(client: httpx.AsyncClient, body: dict[str, object]) -> AsyncIterator[str]:
    async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line:
                yield line


async def test_a_delete_waits_for_streams_with_several_choices_and_gives_the_memory_back(
    server: ServerProcess, tmp_path: Path
) -> None:
    memory = server.metric("loraplex_adapter_memory_bytes", tier="gpu")
    assert server.upload("doomed", unique(tmp_path / "a", seed=1)).status_code == 201
    server.answer("doomed")
    async with server.async_client() as user, server.async_client(ADMIN_KEY) as admin:
        streams = [lines_of(user, long_body("doomed", 80, n=4, seed=i)) for i in range(3)]
        heads = [[await anext(stream)] for stream in streams]
        ended: list[float] = []

        async def read(lines: list[str], stream: AsyncIterator[str]) -> list[str]:
            lines += [line async for line in stream]
            ended.append(time.monotonic())
            return lines

        reading = [asyncio.create_task(read(*pair)) for pair in zip(heads, streams, strict=True)]
        deleted = await asyncio.wait_for(admin.delete("/v1/adapters/doomed"), 30)
        deleted_at = time.monotonic()
        assert deleted.status_code == 200
        assert deleted.json()["freed_bytes"] > 0
        for lines in await asyncio.gather(*reading):
            streamed = events(lines)
            finished = [choice for event in streamed for choice in event["choices"] if choice["finish_reason"]]
            assert [choice["finish_reason"] for choice in finished] == ["length"] * 4
            assert all(text_of(streamed, index) for index in range(4))
        # The streams' last bytes may still be on their way when the engine is done with them.
        assert deleted_at > min(ended) - 0.5
    server.until("loraplex_adapter_memory_bytes", memory, tier="gpu")
    assert not any(card["id"] == "doomed" for card in server.user.get("/v1/models").json()["data"])


async def test_a_name_that_is_draining_is_gone_at_once_and_can_be_taken_again(
    server: ServerProcess, tmp_path: Path
) -> None:
    folder = unique(tmp_path / "a", seed=2)
    assert server.upload("again", folder).status_code == 201
    async with server.async_client() as user, server.async_client(ADMIN_KEY) as admin:
        stream = lines_of(user, long_body("again", 150))
        first = await anext(stream)
        deleting = asyncio.create_task(admin.delete("/v1/adapters/again"))
        while True:
            gone = await user.post("/v1/chat/completions", json=chat_body("again"))
            if gone.status_code == 404:
                break
        assert not deleting.done()
        taken = await asyncio.to_thread(server.upload, "again", folder)
        assert taken.status_code == 201, taken.text
        events([first, *[line async for line in stream]])
        assert (await asyncio.wait_for(deleting, 30)).status_code == 200
        # The same content under the same name outlives the end of the old one.
        await asyncio.to_thread(server.answer, "again")
        assert (await admin.delete("/v1/adapters/again")).status_code == 200


async def test_under_hot_swaps_every_answer_is_one_versions_own(server: ServerProcess) -> None:
    possible = {ANSWERS["shout"], ANSWERS["pirate"]}
    folders = [DEMO_ADAPTERS["shout"], DEMO_ADAPTERS["pirate"]]
    assert server.upload("swapped", folders[0]).status_code == 201
    seen: list[tuple[str, str]] = []
    async with server.async_client() as user:
        swapping = True

        async def ask() -> None:
            while swapping:
                answer = await user.post("/v1/chat/completions", json=chat_body("swapped"))
                assert answer.status_code == 200, answer.text
                label = answer.headers["x-loraplex-adapter"]
                seen.append((label, answer.json()["choices"][0]["message"]["content"]))

        asking = [asyncio.create_task(ask()) for _ in range(6)]
        for turn in range(1, 13):
            swapped = await asyncio.to_thread(server.upload, "swapped", folders[turn % 2], replace="true")
            assert swapped.status_code in (200, 201), swapped.text
            await asyncio.sleep(0.1)
        swapping = False
        await asyncio.gather(*asking)
    assert {text for _, text in seen} == possible
    # The label says which version answered: the odd ones are the first adapter.
    for label, text in seen:
        odd = int(label.partition("@")[2]) % 2 == 1
        assert text == ANSWERS["shout" if odd else "pirate"]
    assert server.admin.delete("/v1/adapters/swapped").status_code == 200


async def test_a_client_that_leaves_frees_its_place(server: ServerProcess) -> None:
    async with server.async_client() as user:
        streams = [lines_of(user, long_body("shout", 1500, n=2)) for _ in range(4)]
        for stream in streams:
            await anext(stream)
        server.until(RUNNING, 8, timeout_s=2)
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]
    assert server.until(RUNNING, 0) < 1.0
    plain = [server.async_client() for _ in range(4)]
    asking = [asyncio.create_task(user.post("/v1/chat/completions", json=long_body(BASE, 1500))) for user in plain]
    await asyncio.to_thread(server.until, RUNNING, 4)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    for user in plain:
        await user.aclose()
    assert server.until(RUNNING, 0) < 1.0
    assert server.metric("loraplex_kv_blocks_used") == 0
    assert server.metric("loraplex_requests_total", outcome="abort") >= 8


async def test_a_client_that_leaves_while_its_adapter_loads_frees_its_place(
    server: ServerProcess, tmp_path: Path
) -> None:
    assert server.upload("slow", unique(tmp_path / "a", seed=3)).status_code == 201
    for _ in range(5):
        with contextlib.suppress(httpx.TimeoutException):
            server.user.post("/v1/chat/completions", json=long_body("slow"), timeout=0.02)
    server.until(RUNNING, 0)
    server.until("vllm:num_requests_waiting", 0)
    assert server.admin.delete("/v1/adapters/slow").status_code == 200


async def test_an_adapter_spoiled_on_disk_fails_its_own_requests_only(server: ServerProcess, tmp_path: Path) -> None:
    uploaded = server.upload("spoiled", unique(tmp_path / "a", seed=4)).json()
    stored = server.data_dir / "adapters" / uploaded["digest"]
    kept = tmp_path / "kept"
    shutil.copytree(stored, kept)
    (stored / WEIGHTS).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not a header at all")
    others: list[str] = []
    asking = threading.Thread(target=lambda: others.extend(server.answer("pirate") for _ in range(5)))
    asking.start()
    for _ in range(2):
        failed = server.chat("spoiled")
        assert failed.status_code == 503, failed.text
        assert failed.json()["error"]["code"] == "adapter_load_failed"
        assert str(server.data_dir) not in failed.text
    asking.join()
    assert others == [ANSWERS["pirate"]] * 5
    shutil.copy(kept / WEIGHTS, stored / WEIGHTS)
    assert server.answer("spoiled")
    shutil.rmtree(stored)
    assert server.answer("spoiled"), "an adapter in memory answers without its file"
    assert server.admin.delete("/v1/adapters/spoiled").status_code == 200
    assert server.user.get("/v1/models").status_code == 200
