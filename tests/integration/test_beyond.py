"""What a worker can and prefork cannot, on a real node: coroutines."""

from __future__ import annotations

import pytest
from celery.exceptions import TimeLimitExceeded
from integration.node import PATIENCE, eventually, running


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    config = {"imports": ["shop.beyond"]}
    with running(tmp_path_factory.mktemp("shop"), "-c", "1", config=config) as (server, node, client):
        yield server, node, client


def send(shop, name, *args, **options):
    return shop[2].send_task(name if "." in name else f"shop.beyond.{name}", args=args, **options)


def result_of(shop, name, *args, **options):
    return send(shop, name, *args, **options).get(timeout=PATIENCE)


def test_the_result_of_a_coroutine_is_the_tasks(shop):
    assert result_of(shop, "add_later", 2, 3) == 5


def test_one_worker_has_one_loop(shop):
    assert result_of(shop, "where") == result_of(shop, "where")


def test_an_exception_comes_with_its_traceback_and_its_errback(shop):
    _, node, client = shop
    errback = client.signature("shop.tasks.quiet", args=("errback",), immutable=True)
    result = send(shop, "fail_later", "no tea", link_error=errback)
    with pytest.raises(LookupError, match="no tea"):
        result.get(timeout=PATIENCE)
    assert "raise LookupError(text)" in result.traceback
    node.notes.wait("quiet", name="errback")


def test_retries(shop):
    result = send(shop, "flaky_later", 2)
    assert result.get(timeout=PATIENCE) == [result.id, 2]
    assert result_of(shop, "auto_later", 2) == 2
    with pytest.raises(OSError, match="again"):
        result_of(shop, "auto_later", 9)


def test_tasks_await_each_other_as_functions(shop):
    assert result_of(shop, "depth", 3) == 3
    with pytest.raises(RuntimeError, match=r"await shop\.beyond\.add_later"):
        result_of(shop, "applies")
    assert result_of(shop, "add_later", 1, 1) == 2


def test_a_soft_limit_is_caught_where_the_coroutine_waits(shop):
    assert result_of(shop, "careful_later", soft_time_limit=0.3) == "cleaned up"


def test_a_hard_limit(shop):
    with pytest.raises(TimeLimitExceeded):
        result_of(shop, "careful_later", time_limit=0.3)


def test_callbacks_and_chains(shop):
    _, node, client = shop
    add = client.signature("shop.beyond.add_later")
    linked = client.signature("shop.tasks.quiet", args=("linked",), immutable=True)
    chain = add.clone(args=(1, 2)) | add.clone(args=(10,)).set(link=linked)
    assert chain.delay().get(timeout=PATIENCE) == 13
    node.notes.wait("quiet", name="linked")


def test_models_of_pydantic(shop):
    assert result_of(shop, "double_order", {"item": "tea", "count": 2}) == {"item": "tea", "count": 4}


def test_a_result_that_nobody_wants(shop, tmp_path):
    send(shop, "quiet_later", str(tmp_path / "ran"))
    eventually((tmp_path / "ran").exists)
