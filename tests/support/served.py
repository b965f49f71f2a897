"""A real OpenAI-compatible server with a small model, `transformers serve`, and a proxy in front of it that has faults.

The proxy counts what is asked, and does to each request what stands next in its list of faults; then, or where the list
is empty, it hands the request on. It also speaks Anthropic's Messages: these are put into the other protocol and back.
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

_PATIENCE_S = 300
_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"
)


def copy_with_template(model: Path, folder: Path) -> Path:
    """Copy a model, with the chat template that a server needs."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return folder


@contextmanager
def serve(model: Path, cache: Path) -> Iterator[str]:
    """Run `transformers serve` with one model; yields the address of its API."""
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
    until = time.monotonic() + _PATIENCE_S
    while True:
        assert server.poll() is None and time.monotonic() < until, "the server did not start"
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)


class Proxy:
    """Stands before a server, in a thread of its own; `url` is what clients are given."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.faults: deque[str] = deque()
        self.asked: list[str] = []  # the prompt of each request that came, faulty or not
        self.answered: list[str] = []  # of each that was handed back whole
        self.delay_s = 0.0
        self.at_once = self.most_at_once = 0
        self.times: list[float] = []
        self.sends_on_to = ""  # where status 307 points
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

    def forget(self) -> None:
        """Begin to count anew, without faults."""
        self.faults.clear()
        self.asked.clear()
        self.answered.clear()
        self.times.clear()
        self.delay_s, self.most_at_once = 0.0, 0

    async def _start(self) -> None:
        # A connection that is kept may be closed by the server in the very moment that it is used again.
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
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
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
            sent = await _send(fault, request, answer)
            self.answered += [prompt] * (fault == "none")
            return sent
        finally:
            self.at_once -= 1

    async def _fail_early(self, fault: str, request: web.Request) -> web.Response | None:
        """Do what does not need an answer."""
        shown = request.headers.get("Authorization", "") + request.headers.get("x-api-key", "")
        if fault.isdigit():
            headers = {"Retry-After": "1"} if fault in ("429", "503") else {}
            if fault == "307":
                headers = {"Location": self.sends_on_to + request.path}
            said = {"error": {"message": f"no, {shown}", "type": "fault", "code": None}}
            return web.json_response(said, status=int(fault), headers=headers)
        if fault == "quota":
            said = {"error": {"message": "pay first", "type": "x", "code": "insufficient_quota"}}
            return web.json_response(said, status=429)
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
    """Return an answer as bytes, not quite what the API promises."""
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
    """Hand an answer back, whole, cut, or drop by drop."""
    headers = {"Content-Type": "application/json", "Content-Length": str(len(answer))}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    if fault == "cut connection":
        await response.write(answer[: len(answer) // 2])
        assert request.transport is not None
        request.transport.abort()
        return response
    if fault == "slow stream":
        for place in range(len(answer)):
            await response.write(answer[place : place + 1])
            await asyncio.sleep(0.5)
    else:
        await response.write(answer)
    await response.write_eof()
    return response


def _as_message(answer: Any) -> Any:
    """Return a chat completion as Anthropic's Messages API has it."""
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
