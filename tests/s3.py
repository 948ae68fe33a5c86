"""A real S3 server on this machine (moto's) whose answers can be spoiled."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("moto.server", reason="moto and flask are not installed: pip install -e .[dev]")
pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e .[s3]")
BUCKET = "s3://corpus"


class S3:
    """Counts the requests of the server, and answers those that `fault` chooses in its way.

    fault: (method, path) -> None (a good answer), "503", "403", "cut" (half of the body), "short"
    (the same, with the length of the half in the header), "close" (no answer), "drip" (a byte in
    0.2 s), or seconds to wait before a good answer.
    """

    def __init__(self, application: Callable):
        self._application = application
        self.fault: Callable[[str, str], str | float | None] = lambda method, path: None
        self.requests: Counter[str] = Counter()
        self.bytes = 0

    def __call__(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests[method] += 1
        fault = self.fault(method, path)
        if isinstance(fault, float):
            time.sleep(fault)
        elif fault == "close":
            environ["werkzeug.socket"].shutdown(2)
        elif fault in ("503", "403"):
            code = {"503": "SlowDown", "403": "AccessDenied"}[fault]
            body = b"" if method == "HEAD" else f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            start_response(f"{fault} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        elif fault == "short" and method == "GET":
            begin = start_response

            def start_response(status: str, headers: list[tuple[str, str]], *more) -> Callable:
                lengths = {name: str(int(value) // 2) for name, value in headers if name.lower() == "content-length"}
                return begin(status, [(name, lengths.get(name, value)) for name, value in headers], *more)

        body = b"".join(self._application(environ, start_response))
        self.bytes += len(body)
        if fault == "drip":
            return _drops(body)
        return [body[: len(body) // 2] if fault in ("cut", "short") and method == "GET" else body]


def _drops(body: bytes) -> Iterator[bytes]:
    for byte in body:
        time.sleep(0.2)
        yield bytes([byte])


@contextmanager
def s3_server() -> Iterator[S3]:
    """Starts a server with an empty bucket, which the environment's variables name."""
    import fsspec
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        def log(self, *_) -> None:
            pass

    faults = S3(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True, request_handler=Silent)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # of botocore, in each attempt of s3fs, in each of ours
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    system = fsspec.filesystem("s3")
    system.clear_instance_cache()
    system = fsspec.filesystem("s3")
    system.makedirs("corpus", exist_ok=True)  # moto keeps the buckets of earlier servers
    try:
        yield faults
    finally:
        server.shutdown()
        server.server_close()
        system.clear_instance_cache()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def upload(folder: Path, url: str) -> None:
    """Copies the files of a folder into the store."""
    import fsspec

    for file in sorted(folder.iterdir()):
        with fsspec.open(f"{url}/{file.name}", "wb") as target:
            target.write(file.read_bytes())
