"""Providers without a server: keys, clients, Retry-After."""

import asyncio

import pytest

from retort.synthesis.providers import (
    UnavailableError,
    open_provider,
    read_key,
    read_retry_after,
)
from support.synthesis import synthesis_section


def test_retry_after_is_read_as_seconds_or_as_a_date() -> None:
    def read(**headers: str) -> float | None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return read_retry_after(named, clock=lambda: 784111777.0)  # of the date in RFC 9110, 5.6.7

    assert read(retry_after="2") == 2.0
    assert read(retry_after_ms="250") == 0.25
    assert read(retry_after="Sun, 06 Nov 1994 08:50:07 GMT") == 30.0
    assert read(retry_after="Sun, 06 Nov 1994 08:49:07 GMT") == 0.0
    assert read() is read(retry_after="soon") is None


def test_a_missing_or_invalid_key_is_refused_without_showing_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not in the environment"):
        read_key(synthesis_section())
    assert read_key(synthesis_section(base_url="http://localhost:1/v1")) is None
    monkeypatch.setenv("MINE", "se cret")
    with pytest.raises(ValueError, match="MINE is not a valid key") as raised:
        read_key(synthesis_section(api_key_variable="MINE"))
    assert "se cret" not in str(raised.value)


def test_a_missing_client_is_reported_with_its_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("retort.synthesis.providers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'anthropic>="):
        open_provider(synthesis_section(provider="anthropic"))


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_refused_connection_is_free(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(provider)
    monkeypatch.setenv("MINE", "abcdef")
    section = synthesis_section(
        provider=provider, base_url="http://127.0.0.1:9", api_key_variable="MINE"
    )
    with pytest.raises(UnavailableError, match="no connection"):
        asyncio.run(open_provider(section).answer("x"))
