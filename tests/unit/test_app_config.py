"""Which broker, result backend and pool an app gets: configuration only, nothing is connected."""

import pickle
import pwd
import time

import pytest
from celery import Celery
from kombu.exceptions import OperationalError

from mpworker import embedded
from mpworker.celery import child, steps
from mpworker.celery.app import POOL, DefaultApp, Loader, install, journal_url, kombu_url, settings_of
from mpworker.errors import ConfigurationError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("BROKER_URL", "RESULT_BACKEND", "INCLUDE", "JOURNAL", "START_METHOD"):
        monkeypatch.delenv(f"MPWORKER_{name}", raising=False)
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "CELERY_CONFIG_MODULE", "CELERY_LOADER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MPWORKER_DATA_DIR", str(tmp_path))


def default_app(**options):
    return DefaultApp("mpworker", set_as_current=False, **options)


def plain_app(**options):
    return Celery("proj", set_as_current=False, **options)


class TestDefaultApp:
    def test_without_configuration_it_uses_the_bundled_server(self, tmp_path):
        conf = default_app().conf
        assert conf.broker_url == embedded.broker_url(tmp_path)
        assert conf.result_backend == embedded.result_url(tmp_path)
        assert conf.worker_pool == POOL
        assert list(conf.accept_content) == ["json"]
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("broker", "expected", "results"),
        [
            ("redis://h/1", "redis://h/1", "mpworker+redis://h/1"),
            ("valkey://h/1", "redis://h/1", "mpworker+redis://h/1"),
            ("redis+socket:///p", "redis+socket:///p", "mpworker+socket:///p"),
            ("redis://a/0;redis://b/0", "redis://a/0;redis://b/0", "mpworker+redis://a/0"),
            ("amqp://u:p@h//", "amqp://u:p@h//", None),
        ],
    )
    def test_a_broker_from_the_environment(self, monkeypatch, broker, expected, results):
        monkeypatch.setenv("MPWORKER_BROKER_URL", broker)
        conf = default_app().conf
        assert (conf.broker_url, conf.result_backend) == (expected, results)

    def test_a_result_backend_from_the_environment_gets_the_journal(self, monkeypatch):
        monkeypatch.setenv("MPWORKER_BROKER_URL", "amqp://h//")
        monkeypatch.setenv("MPWORKER_RESULT_BACKEND", "redis://h/2")
        assert default_app().conf.result_backend == "mpworker+redis://h/2"

    def test_celerys_own_variables_are_used(self, monkeypatch):
        monkeypatch.setenv("CELERY_BROKER_URL", "redis://own/0")
        conf = default_app().conf
        assert (conf.broker_url, conf.result_backend) == ("redis://own/0", "mpworker+redis://own/0")

    def test_celerys_own_configuration_is_used(self):
        app = default_app()
        app.config_from_object({"broker_url": "redis://mine/0", "result_backend": "rpc://", "worker_pool": "solo"})
        assert (app.conf.broker_url, app.conf.result_backend, app.conf.worker_pool) == (
            "redis://mine/0",
            "rpc://",
            "solo",
        )

    def test_the_environment_wins_over_a_configuration_module(self, monkeypatch):
        monkeypatch.setenv("MPWORKER_BROKER_URL", "redis://env/0")
        app = default_app()
        app.config_from_object({"broker_url": "redis://mine/0"})
        assert app.conf.broker_url == "redis://env/0"

    def test_included_modules_come_from_both(self, monkeypatch):
        monkeypatch.setenv("MPWORKER_INCLUDE", "proj.tasks,example")
        app = default_app(include=["first", "example"])
        assert list(app.conf.include) == ["first", "example", "proj.tasks"]

    def test_two_apps_do_not_share_defaults(self, monkeypatch, tmp_path):
        assert default_app().conf.broker_url == embedded.broker_url(tmp_path)
        assert plain_app().conf.worker_pool == "prefork"
        assert plain_app().conf.broker_url is None

    def test_a_wrong_setting_sends_no_client_to_another_server(self, monkeypatch, tmp_path):
        monkeypatch.setenv("MPWORKER_START_METHOD", "nonsense")
        app = default_app()
        assert app.conf.broker_url == embedded.broker_url(tmp_path)
        with pytest.raises(ConfigurationError, match="MPWORKER_START_METHOD"):
            settings_of(app)

    def test_a_client_without_a_node_soon_hears_so(self, tmp_path):
        begun = time.monotonic()
        with pytest.raises(OperationalError, match="no node is running here") as caught:
            default_app().send_task("proj.add")
        assert str(embedded.socket_path(tmp_path)) in str(caught.value)
        assert time.monotonic() - begun < 5.0

    def test_it_can_be_pickled_for_a_fresh_process(self, monkeypatch):
        monkeypatch.setenv("MPWORKER_INCLUDE", "proj.tasks")
        app = default_app()
        app.conf.task_time_limit = 7
        assert app.conf.worker_pool == POOL
        monkeypatch.delenv("MPWORKER_INCLUDE")
        copy = pickle.loads(pickle.dumps(app))
        assert isinstance(copy, DefaultApp)
        assert (copy.conf.task_time_limit, list(copy.conf.include)) == (7, ["proj.tasks"])


class Settings:
    CELERY_BROKER_URL = "redis://h/1"
    CELERY_RESULT_BACKEND = "redis://h/2"
    CELERY_MPWORKER_INCLUDE = "proj.tasks"


class TestInstall:
    def check(self, app, results="mpworker+redis://h/2"):
        assert (app.conf.worker_pool, app.conf.result_backend) == (POOL, results)

    def test_before_the_configuration(self):
        app = plain_app()
        assert install(app) is app
        app.config_from_object({"result_backend": "redis://h/2"})
        self.check(app)

    def test_after_the_configuration(self):
        app = plain_app()
        app.config_from_object({"result_backend": "redis://h/2"})
        assert app.conf.worker_pool == "prefork"
        self.check(install(app))

    def test_configured_again_afterwards(self):
        app = install(plain_app(backend="redis://h/9"))
        self.check(app, "mpworker+redis://h/9")
        app.config_from_object({"result_backend": "redis://h/2", "task_time_limit": 3})
        self.check(app, app.conf.result_backend)
        assert app.conf.result_backend.startswith("mpworker+redis://h/")
        assert app.conf.task_time_limit == 3

    @pytest.mark.parametrize("first", [True, False])
    def test_with_djangos_namespace(self, first):
        app = plain_app()
        if first:
            install(app)
        app.config_from_object(Settings, namespace="CELERY")
        if not first:
            install(app)
        self.check(app)
        assert settings_of(app).include == ("proj.tasks",)

    def test_constructor_arguments(self):
        self.check(install(plain_app(backend="redis://h/2")))

    def test_twice_is_as_good_as_once(self):
        app = install(install(plain_app(backend="redis://h/2")))
        self.check(app)

    @pytest.mark.parametrize("url", ["rpc://", "db+sqlite:///x", "mpworker+redis://h/0"])
    def test_other_result_backends_stay(self, url):
        app = install(plain_app(backend=url))
        assert app.conf.result_backend == url

    def test_no_result_backend_stays_none(self):
        assert install(plain_app()).conf.result_backend is None

    def test_it_configures_nothing_early(self):
        app = install(plain_app())
        assert not app.configured

    def test_a_pickled_app_keeps_the_pool_and_the_journal(self):
        app = install(plain_app(backend="redis://h/2"))
        assert app.conf.worker_pool == POOL
        self.check(pickle.loads(pickle.dumps(app)))

    def test_an_unknown_setting_ends_a_workers_start(self):
        app = install(plain_app())
        app.conf.mpworker_journl = "x"
        with pytest.raises(SystemExit, match="did you mean mpworker_journal"):
            app.loader.import_default_modules()

    def test_an_unknown_setting_with_a_namespace(self):
        class Wrong(Settings):
            CELERY_MPWORKER_JOURNL = "x"

        app = install(plain_app())
        app.config_from_object(Wrong, namespace="CELERY")
        with pytest.raises(ConfigurationError, match="mpworker_journl"):
            settings_of(app)

    def test_a_result_backend_set_late_is_caught_when_a_worker_starts(self, tmp_path):
        app = install(plain_app())
        assert app.conf.worker_pool == POOL
        app.conf.result_backend = "redis://localhost:1/2"
        self.prepare(app)
        self.check(app, "mpworker+redis://localhost:1/2")

    def test_a_result_backend_from_the_command_line_is_caught_too(self, monkeypatch):
        monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://localhost:1/3")
        app = install(plain_app())
        self.prepare(app)
        assert app.conf.result_backend == "mpworker+redis://localhost:1/3"

    def prepare(self, app):
        from mpworker.celery.backend import disable_journal

        try:
            steps.prepare_results(app, "celery@here")
        finally:
            disable_journal()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h", "mpworker+redis://h"),
        ("rediss://h", "mpworker+rediss://h"),
        ("sentinel://h:1;sentinel://g:1", "mpworker+sentinel://h:1;sentinel://g:1"),
        ("valkeys://h", "mpworker+rediss://h"),
        ("mpworker+valkey://h", "mpworker+redis://h"),
        ("redis+socket:///p", "mpworker+socket:///p"),
        ("cache+memory://", "cache+memory://"),
        (None, None),
    ],
)
def test_journal_url(url, expected):
    assert journal_url(url) == expected


def test_kombu_url_of_several_brokers():
    assert kombu_url(["valkey://a", "amqp://b"]) == ["redis://a", "amqp://b"]
    assert kombu_url("valkey://a;valkeys://b") == "redis://a;rediss://b"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("localhost", "no scheme"),
        ("redis//localhost", "no scheme"),
        ("://x", "no scheme"),
        ("htp://x", "nobody knows htp"),
        ("redis://h:port/0", "port"),
        ("redis://h:99999/0", "port"),
        ("redis://h/0;htp://x", "nobody knows htp"),
    ],
)
def test_a_malformed_broker_url_is_named(monkeypatch, url, says):
    monkeypatch.setenv("MPWORKER_BROKER_URL", url)
    with pytest.raises(ConfigurationError, match=f"^MPWORKER_BROKER_URL: .*{says}") as caught:
        steps.check_broker_url(default_app())
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("url", ["redis://:s3cret@h:port/0", "amqp://me:s3@cret@h:port//"])
def test_no_message_shows_a_password(monkeypatch, url):
    monkeypatch.setenv("MPWORKER_BROKER_URL", url)
    with pytest.raises(ConfigurationError) as caught:
        steps.check_broker_url(default_app())
    assert "cret" not in str(caught.value)
    assert ":**@h" in str(caught.value)


def test_a_module_that_cannot_be_imported_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "mpw_broken_module.py").write_text("x = 1\nraise RuntimeError('first\\nsecond')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MPWORKER_INCLUDE", "mpw_broken_module")
    with pytest.raises(ConfigurationError) as caught:
        Loader(default_app()).import_task_module("mpw_broken_module")
    text = str(caught.value)
    assert "mpw_broken_module, named by MPWORKER_INCLUDE: RuntimeError: first" in text
    assert text.endswith("mpw_broken_module.py:2)")


def test_rabbitmq_without_a_result_backend_is_said(monkeypatch, caplog):
    monkeypatch.setenv("MPWORKER_BROKER_URL", "amqp://h//")
    monkeypatch.setenv("MPWORKER_BROKER_ULR", "typo")
    steps.warn(default_app())
    assert any("MPWORKER_RESULT_BACKEND" in line for line in caplog.messages)
    assert any("did you mean MPWORKER_BROKER_URL" in line for line in caplog.messages)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    for name in ("MPWORKER_DATA_DIR", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    app = default_app()
    assert "MPWORKER_DATA_DIR-is-not-usable" in app.conf.broker_url
    with pytest.raises(ConfigurationError, match="set MPWORKER_DATA_DIR"):
        settings_of(app)


def test_an_app_that_importing_its_module_does_not_make_is_one_clear_line():
    spec = child.AppSpec(("json", "app"), b"", {}, ())
    with pytest.raises(ConfigurationError, match="importing json does not make the app 'app' there"):
        child.load(spec)


def test_tasks_that_no_import_makes_are_known_by_name():
    def local():
        pass

    app = plain_app()
    app.task(name="proj.local")(local)
    app.task(name="proj.importable")(default_app)
    assert child.local_tasks(app) == ["proj.local"]
