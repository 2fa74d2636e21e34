"""The node's shipper: results get to Redis, and nobody who runs tasks waits for that, nor minds the shipper's death.

One that is its node's only task is brought there by the process that ran it; all others here have company.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import support
from celery import Celery, chain, chord
from integration.node import PATIENCE, Node, Server, ask, eventually, running

from mpworker.results.journal import Journal

Shop = tuple[Server, Node, Celery]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with running(tmp_path_factory.mktemp("shop"), "-c", "3") as (server, node, client):
        shipper_of(node)
        yield server, node, client


@contextmanager
def company(node: Node, client: Celery, name: str) -> Iterator[None]:
    """Another task runs, which has a name of its own."""
    other = client.send_task("shop.tasks.hold", args=(name,))
    node.notes.wait("hold", name=name)
    try:
        yield
    finally:
        (node.folder / name).touch()
        assert other.get(timeout=PATIENCE) == name


@pytest.fixture
def in_company(shop: Shop, request: pytest.FixtureRequest) -> Iterator[None]:
    with company(shop[1], shop[2], request.node.name):
        yield


def send(shop: Shop, name: str, *args: Any, **options: Any) -> Any:
    return shop[2].send_task(f"shop.tasks.{name}", args=args, **options)


def shipper_of(node: Node, *but: int) -> int:
    """Its pid, once it listens: it says what it is a moment before."""

    def settled() -> list[int]:
        return [pid for pid in node.pids("mpworker: shipper") if pid not in but and _locks(pid)]

    (pid,) = eventually(settled, what="a shipper that listens")
    return pid


def _locks(pid: int) -> bool:
    with open("/proc/locks") as file:
        return any(f" {pid} " in line and "POSIX" in line for line in file)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: support.look(pid).state == "T")  # type: ignore[union-attr]
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def lines_of(node: Node, result: Any) -> list[dict[str, Any]]:
    lines = [line for path in Journal.files(node.journal) for line in path.read_bytes().splitlines()]
    return [line for line in map(json.loads, lines) if line["task_id"] == result.id]


def ended(node: Node, result: Any) -> None:
    eventually(lambda: lines_of(node, result), what="its record is in the journal")


@pytest.mark.usefixtures("in_company")
def test_a_result_is_the_shippers_from_the_journal_on(shop: Shop) -> None:
    server, node, client = shop
    with stopped(shipper_of(node)):
        result = send(shop, "add", 1, 1)
        ended(node, result)
        assert [line["shipped"] for line in lines_of(node, result)] == [0]
        assert result.state == "PENDING"
        assert server.client().exists(f"celery-task-meta-{result.id}") == 0
        other = send(shop, "add", 2, 2)
        ended(node, other)
        eventually(lambda: ask(client, node, "stats")["total"]["shop.tasks.add"] == 2)  # nobody waits for Redis
    assert [result.get(timeout=PATIENCE), other.get(timeout=PATIENCE)] == [2, 4]
    eventually(lambda: [line["shipped"] for line in lines_of(node, result)] == [1])


@pytest.mark.usefixtures("in_company")
def test_what_others_go_on_with_is_in_redis_first(shop: Shop) -> None:
    _, node, client = shop

    def sig(name: str, *args: Any) -> Any:
        return client.signature(f"shop.tasks.{name}", args=args)

    with stopped(shipper_of(node)):
        steps = chain(sig("add", 1, 1), sig("add", 2), app=client)()
        assert steps.parent.get(timeout=PATIENCE) == 2
        parts = chord([sig("add", n, n) for n in range(4)], app=client)(sig("total")).parent
        eventually(lambda: [part.state for part in parts.results] == ["SUCCESS"] * 4)
        assert [part.result for part in parts.results] == [0, 2, 4, 6]
        linked = sig("add", 3, 3).apply_async(link=sig("add", 1))
        assert linked.get(timeout=PATIENCE) == 6
        eventually(lambda: [line["shipped"] for line in lines_of(node, linked)] == [1])


@pytest.mark.usefixtures("in_company")
def test_in_the_node_its_own_results_are_known_at_once(shop: Shop) -> None:
    _, node, _ = shop
    with stopped(shipper_of(node)):
        result = send(shop, "add", 20, 1)
        failed = send(shop, "fail", "no")
        ended(node, result)
        ended(node, failed)
        known = send(shop, "known", [result.id, failed.id, "nobody"], link=shop[2].signature("shop.tasks.give_back"))
        assert known.get(timeout=PATIENCE) == [["SUCCESS", "21"], ["FAILURE", "no"], ["PENDING", "None"]]


@pytest.mark.usefixtures("in_company")
def test_what_is_forgotten_on_its_way_never_arrives(shop: Shop) -> None:
    server, node, _ = shop
    with stopped(shipper_of(node)):
        result = send(shop, "add", 1, 2)
        ended(node, result)
        forgetting = send(shop, "forget", result.id, link=shop[2].signature("shop.tasks.give_back"))
        assert forgetting.get(timeout=PATIENCE) == "PENDING"
        after = send(shop, "add", 2, 2)
        ended(node, after)
    assert after.get(timeout=PATIENCE) == 4
    assert server.client().exists(f"celery-task-meta-{result.id}") == 0
    assert [line["shipped"] for line in lines_of(node, result)] == [1]


@pytest.mark.usefixtures("in_company")
def test_a_journal_that_is_removed_costs_no_result(shop: Shop) -> None:
    _, node, _ = shop
    assert send(shop, "add", 1, 1).get(timeout=PATIENCE) == 2
    with stopped(shipper_of(node)):
        before = [send(shop, "add", n, 1) for n in range(4)]
        for result in before:
            ended(node, result)
        for path in Journal.files(node.journal):
            path.unlink()
        after = [send(shop, "add", n, 2) for n in range(4)]
    assert [result.get(timeout=PATIENCE) for result in before] == [1, 2, 3, 4]  # by the shipper, which has it open
    assert [result.get(timeout=PATIENCE) for result in after] == [2, 3, 4, 5]
    eventually(lambda: lines_of(node, send_and_wait(shop)), what="the file has been made anew")


def send_and_wait(shop: Shop) -> Any:
    result = send(shop, "add", 0, 0)
    assert result.get(timeout=PATIENCE) == 0
    return result


@pytest.mark.usefixtures("in_company")
def test_its_death_is_nobodys(shop: Shop) -> None:
    _, node, client = shop
    pid = shipper_of(node)
    with stopped(pid):
        result = send(shop, "add", 5, 5)
        ended(node, result)
        os.kill(pid, signal.SIGKILL)
    assert result.get(timeout=PATIENCE) == 10  # by the next one
    assert [send(shop, "add", n, n).get(timeout=PATIENCE) for n in range(5)] == [0, 2, 4, 6, 8]
    assert ask(client, node, "stats")["pool"]["shipper"] == [shipper_of(node, pid)]
    node.await_log("the service process has ended; it is started again")


def test_redis_may_be_away_for_as_long_as_it_likes(shop: Shop) -> None:
    """The results' server alone: no task, and no line of the log, is about it but the shipper's own."""
    _, node, _ = shop
    with Server() as results:
        env = {"SHOP_RESULTS": results.results}
        with running(node.folder / "other", "-c", "2", env=env) as (_, other, client):
            shipper_of(other)
            results.kill()
            sent = [client.send_task("shop.tasks.late_add", args=(n, n)) for n in range(100)]
            eventually(lambda: ask(client, other, "stats")["total"].get("shop.tasks.late_add") == 100)
            eventually(lambda: all(lines_of(other, result) for result in sent))
            other.await_log("results wait in the journal")
            assert "marked as not shipped" not in other.log()
            results.start()
            with_results = Celery("watcher", broker=results.broker, backend=results.results, set_as_current=False)
            found = [with_results.AsyncResult(result.id) for result in sent]
            assert [result.get(timeout=PATIENCE) for result in found] == [2 * n for n in range(100)]
            with_results.backend.result_consumer.cancel_for = lambda task_id: None
            with_results.close()


def ends_alone(node: Node, client: Celery, name: str, *args: Any) -> tuple[Any, int]:
    """Its result, and how that is marked."""
    eventually(lambda: not ask(client, node, "active"), what="nothing else runs")
    result = client.send_task(f"shop.tasks.{name}", args=args)
    ended(node, result)
    eventually(lambda: not ask(client, node, "active"), what="it has ended")
    (line,) = lines_of(node, result)
    return result, line["shipped"]


def test_the_nodes_only_task_brings_its_result_itself(shop: Shop) -> None:
    with running(shop[1].folder / "alone", "-c", "1") as (_, node, client), stopped(shipper_of(node)):
        eventually(lambda: ends_alone(node, client, "add", 1, 1)[1] == 1, what="the process is connected")
        for name, arg, state in (("give_back", 1, "SUCCESS"), ("fail", "no", "FAILURE"), ("give_back", 2, "SUCCESS")):
            result, mark = ends_alone(node, client, name, arg)
            assert (result.state, mark) == (state, 1)


@pytest.mark.parametrize("how", ["stopped", "killed", "full"])
def test_a_redis_that_takes_nothing_gets_it_later(shop: Shop, how: str) -> None:
    """That of the results; and no task, nor any line of the log, is about it."""
    with Server() as results, running(shop[1].folder / how, "-c", "1", env={"SHOP_RESULTS": results.results}) as other:
        _, node, client = other
        with stopped(shipper_of(node)):
            eventually(lambda: ends_alone(node, client, "add", 1, 1)[1] == 1, what="the process is connected")
        with ExitStack() as trouble:
            if how == "stopped":
                trouble.enter_context(stopped(results.pid))
            elif how == "killed":
                results.kill()
                trouble.callback(results.start)
            else:
                results.client().config_set("maxmemory", 1)
                trouble.callback(lambda: results.client().config_set("maxmemory", 0))
            ends = [ends_alone(node, client, "late_add", n, n) for n in range(3)]
            assert [mark for _, mark in ends] == [0, 0, 0]
        eventually(lambda: all(line["shipped"] == 1 for result, _ in ends for line in lines_of(node, result)))
        states = Celery("watcher", backend=results.results, set_as_current=False)
        assert [states.AsyncResult(result.id).state for result, _ in ends] == ["SUCCESS"] * 3
        states.close()
        assert "marked as not shipped" not in node.log()
        assert "Traceback" not in node.log()


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_however_processes_start(method: str, tmp_path: Path) -> None:
    with running(tmp_path, "-c", "2", config={"mpworker_start_method": method}) as (_, node, client):
        pid = shipper_of(node)
        for turn in range(2):
            with company(node, client, f"gate{turn}"), stopped(shipper_of(node)):
                result = client.send_task("shop.tasks.add", args=(1, 1))
                ended(node, result)
                assert result.state == "PENDING"
            assert result.get(timeout=PATIENCE) == 2
            if method != "fork":  # its template's successor is none, and is said to be
                (dispatcher,) = node.pids("mpworker: dispatcher")
                os.kill(dispatcher, signal.SIGKILL)
                shipper_of(node, pid)
