#!/usr/bin/env python3
# SPDX-License-Identifier: MIT-0
"""What yandex_gpt costs beside plain requests: python .ci/bench.py [row ...]

Rows: import, run, stream, chat, threads, upload, first-chunk; all of them when none is named.
Needs requests alone, and about a minute; `upload` writes 512 MiB to the temporary folder.

A row is a ratio, so that any machine can measure it: the same work is done by requests as a
careful user would write it and by yandex_gpt, turn by turn in one process, against a server in
another process that sends bytes made beforehand. CPU is this process's own (user and system);
the median of all rounds counts. The exit code is 1 when a row is over its budget.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
FOLDER, KEY = "b1gbench", "bench-key"
COMPLETION, CHAT = "/foundationModels/v1/completion", "/v1/chat/completions"

# --- The server: fixed answers, chosen by the prompt -----------------------------------------


def completion(text: str, status: str) -> bytes:
    "One native answer, as the service sends it: UTF-8, 64-bit integers as strings."
    message = {"role": "assistant", "text": text}
    usage = {"inputTextTokens": "14", "completionTokens": "83", "totalTokens": "97"}
    usage["completionTokensDetails"] = {"reasoningTokens": "0"}  # type: ignore[assignment]
    alternative = {"message": message, "status": f"ALTERNATIVE_STATUS_{status}"}
    result = {"alternatives": [alternative], "usage": usage, "modelVersion": "23.10.2024"}
    return json.dumps({"result": result}, ensure_ascii=False).encode()


def chat_event(text: str, finish: str | None) -> bytes:
    "One event of a chat stream."
    delta = {"role": "assistant", "content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    event = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1760000000}
    event |= {"model": f"gpt://{FOLDER}/yandexgpt/latest", "choices": [choice]}
    return b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"


def chunked(pieces: list[bytes], content_type: bytes) -> bytes:
    "A whole answer of HTTP/1.1 with one chunk for each piece."
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n" % content_type
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def answers() -> dict[bytes, bytes]:
    "Prompt -> everything that the server sends for it."
    words = "Небо голубое, потому что воздух рассеивает короткие волны света сильнее длинных. "
    long_text = (words * 1300)[:100_000]
    one = completion(words * 8, "FINAL")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    # a thousand lines, each with all the text so far: 100 bytes more than the line before
    texts = [long_text.encode()[: 100 * n].decode(errors="ignore") for n in range(1, 1001)]
    lines = [completion(text, "PARTIAL") + b"\n" for text in texts]
    lines[-1] = completion(texts[-1], "FINAL") + b"\n"
    whole = b"".join(lines)
    cuts = [whole[at : at + 16384] for at in range(0, len(whole), 16384)]
    events = [chat_event(f"{word} ", None) for word in (words * 100).split()[:999]]
    events.append(chat_event("Всё.", "stop") + b"data: [DONE]\n\n")
    return {
        b"run": head % len(one) + one,
        b"lines": chunked(lines, b"application/json"),
        b"cuts": chunked(cuts, b"application/json"),
        b"events": chunked(events, b"text/event-stream"),
    }


def serve() -> None:
    "Prints the port, then answers until standard input ends (so never outlives its parent)."
    ready = answers()
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    threading.Thread(target=accept, args=(listener, ready), daemon=True).start()
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    sys.stdin.read()


def accept(listener: socket.socket, ready: dict[bytes, bytes]) -> None:
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=converse, args=(connection, ready), daemon=True).start()


def converse(connection: socket.socket, ready: dict[bytes, bytes]) -> None:
    "All requests of one connection."
    reader, sink = connection.makefile("rb"), bytearray(65536)
    with connection, reader:
        while line := reader.readline():
            length = 0
            while (header := reader.readline()) != b"\r\n":
                name, _, value = header.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            if line.startswith(b"PUT"):
                while length:
                    length -= reader.readinto(memoryview(sink)[: min(length, 65536)])
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                continue
            message = json.loads(reader.read(length))["messages"][0]
            prompt = message.get("text") or message["content"]
            if prompt == "stamp":
                send_stamped(connection)
            else:
                connection.sendall(ready[prompt.encode()])


def send_stamped(connection: socket.socket) -> None:
    "Two lines; the first one's text is the moment at which it was flushed."
    whole = chunked([b"?"], b"application/json")
    connection.sendall(whole[: whole.index(b"\r\n\r\n") + 4])
    for status, pause in (("PARTIAL", 0.005), ("FINAL", 0.02)):
        time.sleep(pause)
        line = completion(str(time.monotonic_ns()), status) + b"\n"
        connection.sendall(b"%x\r\n%s\r\n" % (len(line), line))
    connection.sendall(b"0\r\n\r\n")


def serve_stand_in() -> None:
    "LocalYandexGPT, which counts what is uploaded and keeps nothing."
    # Only the part above the tests is run, because the tests import pytest and responses.
    path = ROOT / "test_yandex_gpt.py"
    module = sys.modules["stand_in"] = types.ModuleType("stand_in")
    module.__file__ = str(path)
    source = path.read_text(encoding="utf-8").split("\nif __name__ == ")[0]
    exec(compile(source, str(path), "exec"), module.__dict__)
    with module.LocalYandexGPT(discard=True) as server:
        print(server.url, flush=True)
        sys.stdin.read()


@contextmanager
def server(kind: str = "serve") -> Iterator[str]:
    "The URL of a server of this kind in a process of its own."
    command = [sys.executable, __file__, kind]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit(f"{kind}: the server did not start")
        try:
            yield url
        finally:
            process.stdin.close()


# --- Measuring -------------------------------------------------------------------------------


def cpu(work: Callable[[], object]) -> float:
    "Seconds of processor time, user and system, of all threads here."
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(baseline: Callable[[], object], candidate: Callable[[], object], rounds: int) -> float:
    "The candidate's CPU as a multiple of the baseline's, turn by turn: the median of the rounds."
    baseline(), candidate()  # makes connections and fills caches
    pairs = [(cpu(baseline), cpu(candidate)) for _ in range(rounds)]
    return statistics.median(after / before for before, after in pairs)


def memory(field: str = "VmRSS:") -> float:
    "MiB that this process holds, or with VmHWM: held at most (all there is where /proc is not)."
    try:
        with open("/proc/self/status") as status:
            return int(status.read().split(field)[1].split()[0]) / 1024
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (1024 if sys.platform != "darwin" else 1 << 20)


def report(row: str, value: float, text: str, budget: float, aim: str, unit: str = "x") -> bool:
    "Prints one line. True: the value is within the budget."
    verdict = "ok" if value <= budget else "OVER BUDGET"
    limit = f"{budget:.2f}x" if unit == "x" else f"+{budget:g} {unit}"
    print(f"{row:<14}{text}  (budget {limit}, aim {aim})  {verdict}", flush=True)
    return value <= budget


def report_ratio(row: str, value: float, against: str, budget: float, aim: float) -> bool:
    return report(row, value, f"{value:.2f}x of {against}", budget, f"{aim:.2f}x")


# --- Rows ------------------------------------------------------------------------------------

IMPORTS = """
import sys, time
{memory}
sys.path.insert(0, {root!r})
start = time.process_time()
import requests
between, held = time.process_time(), memory()
again = time.process_time()
import yandex_gpt
end = time.process_time()
print(1 + (end - again) / (between - start), memory() - held)
"""


def row_import() -> bool:
    "yandex_gpt after requests, against requests alone; each time in a new process."
    script = IMPORTS.format(root=str(ROOT), memory=inspect.getsource(memory))
    with tempfile.TemporaryDirectory() as folder:
        # the compiled module must not be left to whether the checkout can be written to
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [sys.executable, "-c", script]
        outputs = [subprocess.check_output(command, env=environment) for _ in range(16)][1:]
    ratios, sizes = zip(*(map(float, output.split()) for output in outputs))
    value, size = statistics.median(ratios), statistics.median(sizes)
    fast = report_ratio("import", value, "import requests", 1.20, 1.10)
    return report("import", size, f"+{size:.1f} MB of memory", 4, "less", "MB") and fast


def model(kind: str, url: str) -> Any:
    "A Model or ChatModel that asks the bench's server."
    import yandex_gpt

    client = yandex_gpt.ClientConfig(endpoint=url)
    return getattr(yandex_gpt, kind)("yandexgpt", folder_id=FOLDER, auth=KEY, client=client)


def session(pool: int = 10) -> requests.Session:
    "What a careful user of requests makes once: a session with its credential."
    made = requests.Session()
    made.headers["Authorization"] = f"Api-Key {KEY}"
    made.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=pool))
    return made


def question(prompt: str, *, stream: bool = False) -> dict[str, Any]:
    "The body of run and run_stream."
    return {
        "modelUri": f"gpt://{FOLDER}/yandexgpt/latest",
        "completionOptions": {"stream": stream},
        "messages": [{"role": "user", "text": prompt}],
    }


def lines(response: requests.Response) -> Iterator[bytes]:
    "A stream's lines, split by hand."
    rest = b""
    for piece in response.iter_content(None):
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole


def row_run() -> bool:
    with server() as url:
        bare, ours = session(), model("Model", url)

        def baseline() -> None:
            for _ in range(100):
                bare.post(url + COMPLETION, json=question("run")).json()

        def candidate() -> None:
            for _ in range(100):
                ours.run("run")

        value = compare(baseline, candidate, 15)
    return report_ratio("run", value, "requests.Session().post", 0.75, 0.60)


def row_stream() -> bool:
    "A thousand lines that grow to 100 KB: one line a chunk of HTTP, and cut every 16 KiB."
    within = True
    with server() as url:
        bare, ours = session(), model("Model", url)
        for prompt, name in (("lines", "a line a chunk"), ("cuts", "cut every 16 KiB")):

            def baseline(prompt: str = prompt) -> None:
                body = question(prompt, stream=True)
                with bare.post(url + COMPLETION, json=body, stream=True) as response:
                    count = sum(1 for line in lines(response) if json.loads(line))
                assert count == 1000, count

            def candidate(prompt: str = prompt) -> None:
                count = sum(1 for result in ours.run_stream(prompt) if result.text)
                assert count == 1000, count

            value = compare(baseline, candidate, 7)
            against = f"requests' iter_content, {name}"
            within = report_ratio("stream", value, against, 1.15, 1.05) and within
    return within


def row_chat() -> bool:
    "A chat stream of a thousand events, each in a chunk of its own, keeping the text so far."
    with server() as url:
        bare, ours = session(), model("ChatModel", url)
        body = {"model": f"gpt://{FOLDER}/yandexgpt/latest", "stream": True}
        body["messages"] = [{"role": "user", "content": "events"}]

        def baseline() -> None:
            for _ in range(10):
                text = ""
                with bare.post(url + CHAT, json=body, stream=True) as response:
                    for line in lines(response):
                        if line.startswith(b"data: {"):
                            text += json.loads(line[6:])["choices"][0]["delta"]["content"]
                assert text.endswith("."), text[-10:]

        def candidate() -> None:
            for _ in range(10):
                for result in ours.run_stream("events"):
                    text = result.text
                assert text.endswith("."), text[-10:]

        value = compare(baseline, candidate, 9)
    return report_ratio("chat", value, "requests' iter_content", 1.40, 1.20)


def row_threads() -> bool:
    "64 threads at once, each with ten calls."
    threads, calls = 64, 10
    barrier = threading.Barrier(threads)
    with server() as url, ThreadPoolExecutor(threads) as pool:
        bare, ours = session(pool=threads), model("Model", url)

        def together(call: Callable[[], object]) -> None:
            def work(_: int) -> None:
                barrier.wait()
                for _ in range(calls):
                    call()

            list(pool.map(work, range(threads)))

        def baseline() -> None:
            together(lambda: bare.post(url + COMPLETION, json=question("run")).json())

        value = compare(baseline, lambda: together(lambda: ours.run("run")), 7)
    return report_ratio("threads", value, "a session with a pool of 64", 0.80, 0.65)


def row_upload() -> bool:
    "512 MiB of rows from disk, against one PUT of the same file."
    row = json.dumps({"request": [{"role": "user", "text": "?"}], "response": "."}).encode()
    block = (row[:-2] + b"." * (1023 - len(row)) + row[-2:] + b"\n") * 1024
    with tempfile.TemporaryDirectory() as folder, server() as url, server("stand-in") as service:
        path = Path(folder, "rows.jsonl")
        with path.open("wb") as file:
            for _ in range(512):
                file.write(block)
        from yandex_gpt import ClientConfig, Dataset

        client = ClientConfig(folder_id=FOLDER, auth=KEY, endpoint=service)

        def baseline() -> None:
            with path.open("rb") as file:
                requests.put(f"{url}/rows.jsonl", data=file).raise_for_status()

        def candidate() -> None:
            Dataset.upload(path, client=client, wait=False)

        held = memory()
        candidate()
        more = memory("VmHWM:") - held
        value = compare(baseline, candidate, 9)
    lean = report("upload", more, f"+{more:.1f} MiB over the start", 16, "+8 MiB", "MiB")
    return report_ratio("upload", value, "a bare PUT", 1.6, 1.3) and lean


def row_first_chunk() -> bool:
    "From the moment at which the server flushed a stream's first line; it is in the text."
    delays: dict[str, list[float]] = {"bare": [], "ours": []}
    with server() as url:
        bare, ours = session(), model("Model", url)
        for _ in range(40):
            body = question("stamp", stream=True)
            with bare.post(url + COMPLETION, json=body, stream=True) as response:
                for number, line in enumerate(lines(response)):
                    answer = json.loads(line)["result"]["alternatives"][0]["message"]["text"]
                    if not number:
                        delays["bare"].append(time.monotonic_ns() - int(answer))
            for number, result in enumerate(ours.run_stream("stamp")):
                if not number:
                    delays["ours"].append(time.monotonic_ns() - int(result.text))
    before, after = (statistics.median(delays[who]) / 1e6 for who in ("bare", "ours"))
    text = f"+{after:.2f} ms after the flush, {after / before:.2f}x of requests"
    return report("first-chunk", after, text, 2, "1.30x", "ms")


ROWS: dict[str, Callable[[], bool]] = {
    "import": row_import,
    "run": row_run,
    "stream": row_stream,
    "chat": row_chat,
    "threads": row_threads,
    "upload": row_upload,
    "first-chunk": row_first_chunk,
}
SERVERS = {"serve": serve, "stand-in": serve_stand_in}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in {**ROWS, **SERVERS}]
    if unknown or any(name.startswith("-") for name in names):
        print(__doc__)
        return 2
    if len(names) == 1 and names[0] in SERVERS:
        SERVERS[names[0]]()
        return 0
    if len(names) == 1:
        return 0 if ROWS[names[0]]() else 1
    # a process for each row: none inherits another's heap, pools or peak of memory
    codes = [subprocess.call([sys.executable, __file__, name]) for name in names or ROWS]
    return max(codes)


if __name__ == "__main__":
    # settings of this machine that would send the requests elsewhere, or to another account
    for variable in list(os.environ):
        if variable.startswith(("YC_", "YANDEX_GPT_")) or variable.lower().endswith("_proxy"):
            del os.environ[variable]
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main(sys.argv[1:]))
