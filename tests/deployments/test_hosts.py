"""Which names an open server on the loopback goes by: no page's, or the page could read from it."""

from __future__ import annotations

import httpx
import pytest
from pydantic import ValidationError

from deployments.api_keys import KEY_VARIABLES
from deployments.ingress.app import build_asgi_app
from deployments.ingress.options import IngressOptions
from deployments.ingress.served import ServedModels


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


async def ask(listens: str | None, host: str, **options: object) -> httpx.Response:
    app = build_asgi_app(ServedModels(), IngressOptions(**options), host=listens)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        return await client.get("/v1/models", headers={"Host": host.encode("latin-1")})


LOOPBACK = ("127.0.0.1", "localhost", "::1", "127.0.0.2")


@pytest.mark.parametrize("listens", LOOPBACK)
async def test_an_open_server_on_the_loopback_goes_by_the_loopbacks_names(listens):
    for host in ("localhost", "LocalHost:8000", "127.0.0.1", "127.0.0.1:8000", "[::1]:8000", ""):
        assert (await ask(listens, host)).status_code == 200, host
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil",
                 "192.168.0.1:8000", "localhost:80:80", "\xff"):  # fmt: skip
        refused = await ask(listens, host)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_not_allowed")
        assert "ingress.allowed_hosts" in refused.json()["error"]["message"]


async def test_other_names_may_be_allowed():
    for host, status in (("llm.example.com:443", 200), ("x.llm.example.com", 403)):
        allowed = await ask("127.0.0.1", host, allowed_hosts=["llm.example.com"])
        assert allowed.status_code == status
    for wrong in ("llm.example.com:443", "https://llm.example.com", "LLM", "*", ""):
        with pytest.raises(ValidationError, match="is no host"):
            IngressOptions(allowed_hosts=[wrong])


@pytest.mark.parametrize("listens", ["0.0.0.0", "::", "10.0.0.5", "llm.example.com", None])
async def test_elsewhere_any_name_will_do(listens):
    assert (await ask(listens, "llm.default.svc:8000")).status_code == 200


async def test_with_keys_any_name_will_do(monkeypatch):
    monkeypatch.setenv("TRUNKLINE_API_KEYS", "sk-a")
    refused = await ask("127.0.0.1", "evil.example")
    assert refused.status_code == 401
