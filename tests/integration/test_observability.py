"""Sentry's and OpenTelemetry's own instrumentations of Celery, as their manuals say, against local collectors."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from integration.node import PATIENCE, Node, Server, client_of, eventually

APP = """
import os
from celery import Celery
{imports}
app = Celery("watched", broker=os.environ["BROKER"], backend=os.environ["RESULTS"])
app.conf.mpworker_start_method = os.environ["METHOD"]

import mpworker
mpworker.install(app)

@app.task
def add(x, y):
    return x + y

@app.task
def breaks(why):
    raise LookupError(why)

@app.task(time_limit=0.4)
def hangs():
    import time
    time.sleep(60)
"""
SENTRY = """
import sentry_sdk
from sentry_sdk.integrations.celery import CeleryIntegration

sentry_sdk.init(dsn=os.environ["SENTRY"], integrations=[CeleryIntegration()], traces_sample_rate=1.0)
"""
OPENTELEMETRY = """
from celery.signals import worker_process_init
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

@worker_process_init.connect(weak=False)
def init_tracing(**_):
    provider = TracerProvider()
    exporter = OTLPSpanExporter(endpoint=os.environ["OTLP"])
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=int(os.environ["DELAY"])))
    trace.set_tracer_provider(provider)
    CeleryInstrumentor().instrument()
"""


class Collector(ThreadingHTTPServer):
    """Takes whatever is posted to it, on a free port of the loopback interface."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[bytes] = []
        #: it answers
        self.open = threading.Event()
        self.open.set()
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()

    def about(self, *words: bytes) -> list[bytes]:
        return [body for body in self.received if all(word in body for word in words)]

    def end(self) -> None:
        self.open.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.open.wait(PATIENCE)
        self.server.received.append(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.end()


@pytest.mark.parametrize("method", ["auto", "fork"])
def test_sentry_hears_of_each_failure_once(method: str, collector: Collector, tmp_path: Path) -> None:
    pytest.importorskip("sentry_sdk")
    (tmp_path / "watched.py").write_text(APP.format(imports=SENTRY))
    address = f"http://key@127.0.0.1:{collector.server_port}/1"
    with Server() as server, client_of(server) as client:
        env = {"BROKER": server.broker, "RESULTS": server.results, "METHOD": method, "SENTRY": address}
        with Node(tmp_path / "node", "-c", "2", app="watched", cwd=tmp_path, env=env) as node:
            assert client.send_task("watched.add", args=(1, 2)).get(timeout=PATIENCE) == 3
            for number in range(3):
                with pytest.raises(LookupError):
                    client.send_task("watched.breaks", args=(f"reason {number}",)).get(timeout=PATIENCE)
            with pytest.raises(Exception, match=r"TimeLimitExceeded|0\.4"):
                client.send_task("watched.hangs").get(timeout=PATIENCE)
            for number in range(3):
                eventually(lambda n=number: collector.about(b'"LookupError"', b"reason %d" % n, b"watched.breaks"))
            eventually(lambda: collector.about(b'"transaction"', b"watched.add"), what="a trace of what succeeded")
            assert node.stop() == 0
        for number in range(3):
            assert len(collector.about(b'"LookupError"', b"reason %d" % number)) == 1


@pytest.mark.parametrize("method", ["auto", "spawn"])
def test_opentelemetry_gets_a_span_of_each_task(method: str, collector: Collector, tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.instrumentation.celery")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    (tmp_path / "watched.py").write_text(APP.format(imports=OPENTELEMETRY))
    address = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    with Server() as server, client_of(server) as client:
        env = {"BROKER": server.broker, "RESULTS": server.results, "METHOD": method, "OTLP": address, "DELAY": "100"}
        with Node(tmp_path / "node", "-c", "2", app="watched", cwd=tmp_path, env=env):
            assert client.send_task("watched.add", args=(1, 2)).get(timeout=PATIENCE) == 3
            with pytest.raises(LookupError):
                client.send_task("watched.breaks", args=("for the trace",)).get(timeout=PATIENCE)
            eventually(lambda: collector.about(b"run/watched.add"), what="the span of a success")
            eventually(lambda: collector.about(b"run/watched.breaks", b"for the trace"), what="the span of a failure")


def test_a_worker_that_leaves_sends_what_it_has_not_sent_yet(collector: Collector, tmp_path: Path) -> None:
    pytest.importorskip("sentry_sdk")
    pytest.importorskip("opentelemetry.instrumentation.celery")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    (tmp_path / "watched.py").write_text(APP.format(imports=SENTRY + OPENTELEMETRY))
    there = f"127.0.0.1:{collector.server_port}"
    with Server() as server, client_of(server) as client:
        env = {"BROKER": server.broker, "RESULTS": server.results, "METHOD": "auto", "SENTRY": f"http://key@{there}/1"}
        env |= {"OTLP": f"http://{there}/v1/traces", "DELAY": "600000"}
        options = "-c", "1", "--max-tasks-per-child", "1"
        with Node(tmp_path / "node", *options, app="watched", cwd=tmp_path, env=env) as node:
            collector.open.clear()  # Sentry's error is on its way, its transaction waits behind that
            with pytest.raises(LookupError):
                client.send_task("watched.breaks", args=("its last words",)).get(timeout=PATIENCE)
            collector.open.set()
            assert client.send_task("watched.add", args=(1, 2)).get(timeout=PATIENCE) == 3  # in its successor
            assert node.stop() == 0
        assert len(collector.about(b'"type":"event"', b'"LookupError"', b"its last words")) == 1
        for span in b'"type":"transaction"', b"run/":
            assert len(collector.about(span, b"watched.breaks")) == 1
            assert len(collector.about(span, b"watched.add")) == 1
