"""A real OpenAI-compatible server with a small model (`transformers serve`), and a proxy before it that injects faults.

The proxy counts requests, and applies to each the next fault in its list; without a fault it forwards the request. It
also speaks Anthropic's Messages API, which it translates to the other protocol and back.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp
from aiohttp import web

_STARTUP_TIMEOUT_S = 300
_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"
)


def copy_with_template(model: Path, folder: Path) -> Path:
    """Copy a model into a new folder, with the chat template that a server needs; return the folder."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return folder


@contextmanager
def run_server(model: Path, cache: Path) -> Iterator[str]:
    """Run `transformers serve` with one model; yield the URL of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    cache.mkdir(exist_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    log = (cache / "serve.log").open("wb")
    with log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server:
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", server)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.kill()


def _wait_for(url: str, server: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + _STARTUP_TIMEOUT_S
    while True:
        assert server.poll() is None and time.monotonic() < until, "the server did not start"
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)


class Proxy:
    """A proxy in its own thread; clients use `url`."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.faults: deque[str] = deque()
        self.asked: list[str] = []  # the prompt of each request, with or without a fault
        self.delay_s = 0.0
        self.num_open = self.max_open = 0  # concurrent requests
        self.times: list[float] = []
        self.redirect_url = ""  # of status 307
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def reset(self) -> None:
        """Reset all counts, and remove the faults."""
        self.faults.clear()
        self.asked.clear()
        self.times.clear()
        self.delay_s, self.max_open = 0.0, 0

    async def _start(self) -> None:
        # The server may close a kept connection at the moment of its next use.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/messages", self._messages)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def _stop(self) -> None:
        await self._session.close()
        await self._runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        async with self._session.get(f"{self.upstream}/models") as response:
            return web.json_response(await response.json(), status=response.status)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return await self._handle(request, body, lambda answer: answer)

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        system = [{"role": "system", "content": body.pop("system")}] if "system" in body else []
        body["messages"] = [*system, *body["messages"]]
        return await self._handle(request, body, _as_message)

    async def _handle(self, request: web.Request, body: Any, translate: Any) -> web.StreamResponse:
        prompt = body["messages"][-1]["content"]
        self.asked.append(prompt)
        self.times.append(time.monotonic())
        fault = self.faults.popleft() if self.faults else "none"
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        try:
            if early := await self._fail_early(fault, request):
                return early
            await asyncio.sleep(self.delay_s)
            url = f"{self.upstream}/chat/completions"
            async with self._session.post(url, json=body) as response:
                content = await response.json()
                if response.status != 200:
                    return web.json_response(content, status=response.status)
            answer = _alter(fault, translate(content))
            return await _send(fault, request, answer)
        finally:
            self.num_open -= 1

    async def _fail_early(self, fault: str, request: web.Request) -> web.Response | None:
        """Return the response of a fault that needs no answer of the server, or None."""
        key = request.headers.get("Authorization", "") + request.headers.get("x-api-key", "")
        if fault.isdigit():
            headers = {"Retry-After": "1"} if fault in ("429", "503") else {}
            if fault == "307":
                headers = {"Location": self.redirect_url + request.path}
            body = {"error": {"message": f"no, {key}", "type": "fault", "code": None}}
            return web.json_response(body, status=int(fault), headers=headers)
        if fault == "quota":
            body = {"error": {"message": "pay first", "type": "x", "code": "insufficient_quota"}}
            return web.json_response(body, status=429)
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "reset":
            assert request.transport is not None
            request.transport.abort()
            await asyncio.sleep(3600)
        bodies = {
            "malformed JSON": ('{"id": "x", "choices": [', "application/json"),
            "no answer in the JSON": ('{"id": "x", "choices": []}', "application/json"),
            "HTML": ("<html>maintenance</html>", "text/html"),
        }
        if fault in bodies:
            text, kind = bodies[fault]
            return web.Response(text=text, content_type=kind)
        return None


def _alter(fault: str, content: Any) -> bytes:
    """Return an answer as bytes, altered by the fault."""
    if fault == "no usage":
        del content["usage"]
    if fault in ("negative usage", "endless usage"):
        number = -(10**6) if fault == "negative usage" else float("inf")
        content["usage"] = dict.fromkeys(content["usage"], number)
    if fault == "long frame":
        content["usage"]["prompt_tokens"] += 300
    if fault == "list for a text":
        content["choices"][0]["message"]["content"] = [{"type": "text", "text": "a part"}]
    if fault == "an error in the JSON":
        content = {"error": {"message": "overloaded", "code": 502}}
    whole = json.dumps(content).encode()
    return whole.replace(b'"content"', b'"content\xff"') if fault == "no UTF-8" else whole


async def _send(fault: str, request: web.Request, answer: bytes) -> web.StreamResponse:
    """Send an answer: complete, cut off, or byte by byte."""
    headers = {"Content-Type": "application/json", "Content-Length": str(len(answer))}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    if fault == "cut connection":
        await response.write(answer[: len(answer) // 2])
        assert request.transport is not None
        request.transport.abort()
        return response
    if fault == "slow stream":
        for index in range(len(answer)):
            await response.write(answer[index : index + 1])
            await asyncio.sleep(0.5)
    else:
        await response.write(answer)
    await response.write_eof()
    return response


def _as_message(answer: Any) -> Any:
    """Return a chat completion in the format of Anthropic's Messages API."""
    choice, usage = answer["choices"][0], answer["usage"]
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": answer["model"],
        "content": [{"type": "text", "text": choice["message"]["content"]}],
        "stop_reason": {"length": "max_tokens"}.get(choice["finish_reason"], "end_turn"),
        "stop_sequence": None,
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "output_tokens": usage["completion_tokens"],
        },
    }
