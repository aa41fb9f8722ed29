"""Who may ask the endpoint, from where, and how much each may ask for."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from test_serve import call, form, save_tiny, service_of

from hrnet_core.errors import ConfigError
from serve.haproxy import FULL_HEADER
from serve.keys import Keys, Rates, read_keys
from serve.routes import make_app
from serve.service import PoseService
from serve.settings import ReplicaSettings

SECRET, OTHER = "0123456789abcdef-first", "fedcba9876543210-second"
FILE = f"""
# who                 key
camera-1              {SECRET}
dashboard@example.com sha256:{hashlib.sha256(OTHER.encode()).hexdigest()}   rate=2 share=0.5
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("serve") / "tiny", 0)


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HRNET_SERVE_KEYS", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "keys").write_text(FILE)
    return tmp_path / "keys"


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def post(service: PoseService, **options: Any) -> httpx.Response:
    return call(service, "POST", "/v1/poses", **form(), **options)


# --- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [SECRET, OTHER])
def test_who_has_a_key_is_answered(checkpoint: Path, file: Path, secret: str) -> None:
    service = service_of(checkpoint, keys=str(file))
    assert post(service, headers=bearer(secret)).status_code == 200
    assert call(service, "POST", "/v1/overlay", **form(), headers=bearer(secret)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("0123456789abcdef-firs"),
        bearer(""),
        {"Authorization": SECRET},
        {"Authorization": f"Basic {SECRET}"},
        {b"Authorization": b"Bearer \xff\xfe"},
        bearer("sha256:" + hashlib.sha256(OTHER.encode()).hexdigest()),
    ],
)
def test_who_has_none_is_told_what_to_send(checkpoint: Path, file: Path, headers: dict[Any, Any]) -> None:
    service = service_of(checkpoint, keys=str(file))
    response = post(service, headers=headers)
    assert response.status_code == 401
    assert response.json()["type"] == "urn:hrnet:problem:unauthorized"
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert call(service, "POST", "/v1/overlay", **form(), headers=headers).status_code == 401


def test_state_and_page_need_no_key_and_tell_no_paths(checkpoint: Path, file: Path) -> None:
    service = service_of(checkpoint, keys=str(file))
    service.load_error = f"{checkpoint}: broken"
    for url in ("/livez", "/readyz", "/", "/docs", "/openapi.json", "/v1/models", "/samples"):
        response = call(service, "GET", url)
        assert response.status_code == 200
        assert str(checkpoint.parent) not in response.text, url
    assert str(checkpoint) in call(service, "GET", "/v1/models", headers=bearer(SECRET)).text
    assert call(service, "GET", "/v1/models", headers=bearer("wrong")).status_code == 401


def test_keys_are_exchanged_without_a_restart_and_a_broken_file_changes_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serve.keys.LOOKED_AT_EVERY_S", 0.0)
    keys, new = Keys(str(file)), "0011223344556677-new"

    def known(secret: str) -> bool:
        try:
            return keys.holder(f"Bearer {secret}") is not None
        except Exception:
            return False

    assert known(SECRET)
    beside = file.with_name("beside")
    beside.write_text(f"camera-1 {new}\n")
    os.replace(beside, file)  # as a mounted secret is exchanged
    assert (known(SECRET), known(new)) == (False, True)
    file.write_text("camera-1 short\n")
    with caplog.at_level(logging.INFO):
        assert known(new), "the old ones stay in force"
    file.unlink()
    assert known(new)
    assert all(secret not in caplog.text for secret in (SECRET, new, "short"))


def test_keys_come_from_the_environment_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HRNET_SERVE_KEYS", "one 0123456789abcdef-one; two 0123456789abcdef-two")
    keys = Keys(str(file))
    names = [keys.holder(f"bearer {s}") for s in ("0123456789abcdef-one", "0123456789abcdef-two", SECRET)]
    assert [key.name for key in names if key] == ["one", "two", "camera-1"]
    assert not Keys(None, needed=True).holder(None)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no key in it"),
        ("# nothing\n", "no key in it"),
        ("camera", "line 1: a name and a key"),
        ("\ncamera Abcdefgh", "line 2: a key has at least 16"),
        ("camera sha256:Abcd", "line 1: after sha256"),
        ("ca/mera Abcdefghijklmnopqrst", "line 1: the name"),
        ("camera Abcdefghijklmnopqrst rat=5", "line 1: after the key"),
        ("camera Abcdefghijklmnopqrst rate=0", "line 1: rate is above 0"),
        ("camera Abcdefghijklmnopqrst rate=x", "line 1: could not convert"),
        ("camera Abcdefghijklmnopqrst share=2", "line 1: rate is above 0, share"),
        ("a Abcdefghijklmnopqrst\nb Abcdefghijklmnopqrst", "line 2: the same key"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_without_its_secrets(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        read_keys(text, "keys.txt")
    assert "keys.txt" in str(caught.value)
    assert "Abcd" not in str(caught.value)


def test_a_replica_that_needs_keys_does_not_start_without(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HRNET_SERVE_KEYS"):
        Keys(None, needed=True)
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys(str(tmp_path / "absent"))


# --- limits of a key ----------------------------------------------------------------------------


def test_a_key_may_ask_so_often(checkpoint: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In no time: on a busy machine three requests take the half second in which one more is allowed."""
    monkeypatch.setattr("serve.keys.time", SimpleNamespace(monotonic=lambda: 100.0))
    service = service_of(checkpoint, keys=str(file))
    answers = [post(service, headers=bearer(OTHER)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429], "rate=2 stands in the file"
    assert answers[2].json()["reason"] == "rate"
    assert answers[2].headers["retry-after"] == "1"
    assert post(service, headers=bearer(SECRET)).status_code == 200, "others are not held up"


def test_rates_fill_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("serve.keys.time", SimpleNamespace(monotonic=lambda: now[0]))
    rates = Rates()
    asked = [rates.wait_s("a", 0.5) for _ in range(2)]
    assert asked == [0.0, 2.0]
    now[0] += 1.5
    assert rates.wait_s("a", 0.5) == pytest.approx(0.5)
    now[0] += 0.5
    assert rates.wait_s("a", 0.5) == 0.0
    now[0] += 1000
    assert [rates.wait_s("a", 3) for _ in range(4)] == [0, 0, 0, pytest.approx(1 / 3)]


def test_a_key_may_have_its_share_of_the_places(checkpoint: Path, file: Path) -> None:
    service = service_of(checkpoint, keys=str(file), max_requests=4, key_share=0.5)
    key = service.keys.holder(f"Bearer {SECRET}")

    async def ask() -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            with service.room.place(key), service.room.place(key):
                mine = await http.post("/v1/poses", **form(), headers=bearer(SECRET))
                others = await http.post("/v1/poses", **form(), headers=bearer(OTHER))
        return mine, others

    mine, others = asyncio.run(ask())
    assert (mine.status_code, mine.json()["reason"]) == (429, "share")
    assert FULL_HEADER not in mine.headers, "others have room, and HAProxy must not refuse them"
    assert others.status_code == 200
    assert post(service, headers=bearer(SECRET)).status_code == 200


# --- browsers -----------------------------------------------------------------------------------


def test_a_host_that_is_not_ours_is_refused(checkpoint: Path) -> None:
    """A name of someone else's that was made to lead to a visitor's own machine."""
    service = service_of(checkpoint, hosts=("127.0.0.1", "localhost", "[::1]"))
    for host in ("127.0.0.1:8000", "LOCALHOST", "[::1]:80"):
        assert call(service, "GET", "/v1/models", headers={"host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example:8000"):
        response = call(service, "GET", "/v1/models", headers={"host": host})
        assert response.status_code == 421
        assert response.json()["type"] == "urn:hrnet:problem:misdirected"
        assert call(service, "GET", "/livez", headers={"host": host}).status_code == 200, (
            "probes use addresses"
        )


def test_pages_of_named_origins_may_ask(checkpoint: Path, file: Path) -> None:
    service = service_of(checkpoint, keys=str(file), cors_origins=("https://app.example",))
    wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("https://app.example", True), ("https://evil.example", False)):
        before = call(service, "OPTIONS", "/v1/poses", headers={"Origin": origin, **wish})
        asked = post(service, headers={"Origin": origin, **bearer(SECRET)})
        refused = post(service, headers={"Origin": origin})
        for response in (before, asked, refused):
            assert (response.headers.get("access-control-allow-origin") == origin) is allowed
    assert (
        "access-control-allow-origin"
        not in post(service_of(checkpoint), headers={"Origin": "https://a.b"}).headers
    )


@pytest.mark.parametrize(
    ("setting", "wrong"),
    [
        ("hosts", "http://poses.example.com"),  # a Host header has a name and a port
        ("hosts", "poses.example.com:8443"),  # which is looked at without its port
        ("hosts", "*.example.com"),
        ("cors_origins", "app.example.com"),  # an Origin header has a scheme, and nothing behind the port
        ("cors_origins", "https://app.example.com/"),
        ("cors_origins", "https://*.example.com"),
    ],
)
def test_a_name_that_no_browser_sends_is_refused_and_not_left_without_effect(
    setting: str, wrong: str
) -> None:
    with pytest.raises(ValidationError, match=re.escape(wrong)) as refused:
        ReplicaSettings.model_validate({setting: (wrong,)})
    assert re.search("example.com", str(refused.value)), "how it is written"


def test_names_of_hosts_and_origins_are_compared_as_browsers_send_them(checkpoint: Path) -> None:
    service = service_of(checkpoint, hosts=("Poses.Example.com",), cors_origins=("HTTPS://App.Example.com",))
    headers = {"host": "poses.example.com", "origin": "https://app.example.com"}
    answer = call(service, "GET", "/v1/models", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example.com"


def test_every_answer_says_how_browsers_are_to_take_it(checkpoint: Path) -> None:
    service = service_of(checkpoint)
    for url in ("/", "/docs", "/v1/models", "/nothing", "/livez"):
        headers = call(service, "GET", url).headers
        assert headers["x-content-type-options"] == "nosniff", url
        assert re.search(r"frame-ancestors 'none'", headers["content-security-policy"]), url
        assert headers["referrer-policy"] == "no-referrer"
