"""P15: whatever JSON a body holds, the answer is a success or a refusal, never a failure of the server."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex_server.api.chat_request import ChatRequest
from loraplex_server.api.completion_request import CompletionRequest
from loraplex_server.api.tokenize import DetokenizeRequest, TokenizeRequest
from tests.api.servers import Server, scripted_services, serve

VALID: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatRequest, {"model": "poet", "messages": [{"role": "user", "content": "Hi"}]}),
    "/v1/completions": (CompletionRequest, {"model": "poet", "prompt": "Hi"}),
    "/tokenize": (TokenizeRequest, {"prompt": "Hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [65]}),
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 20)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["poet", "base-model", "user", "system", "text", "\ud800", "\x00", "1", "stop"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=6) | st.sampled_from(["role", "content", "type", "text", "include_usage", "65"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(scripted_services(tmp_path_factory.mktemp("fuzz"), adapters=("poet",))) as server:
        yield server


@pytest.mark.parametrize("path", VALID)
@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_breaks_the_server(server: Server, path: str, data: st.DataObject) -> None:
    model, valid = VALID[path]
    fields = data.draw(st.lists(st.sampled_from(sorted(model.model_fields)), min_size=1, max_size=3, unique=True))
    body = {**valid, **{name: data.draw(values) for name in fields}}
    with server.http() as http:
        headers = {"content-type": "application/json"}
        response = http.post(path, content=json.dumps(body).encode(), headers=headers)
    assert response.status_code in (200, 400, 404), (body, response.text)
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
