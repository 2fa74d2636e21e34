"""Settings: every value from its place, and one clear line for each that does not fit."""

from __future__ import annotations

import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mpworker.celery import start
from mpworker.celery.slot_env import slot_env_of, warn_beyond
from mpworker.celery.start import start_method_of
from mpworker.errors import ConfigurationError
from mpworker.settings import Settings, default_data_dir, unknown_variables


def load(environ: dict[str, str] | None = None, **conf: object) -> Settings:
    return Settings.load(conf, environ or {})


def test_defaults() -> None:
    settings = load()
    assert (settings.start_method, settings.journal_fsync, settings.include) == ("auto", "batch", ())
    assert settings.journal_dir == settings.data_dir / "journal"
    assert (settings.max_deaths, settings.stall_timeout) == (3, 60.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.start_method = "fork"  # type: ignore[misc]


def test_the_data_directory_is_private_to_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / "mpworker"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / ".local/state/mpworker"
    assert not any(tmp_path.iterdir())


def test_the_environment_wins_and_an_empty_variable_counts_as_unset() -> None:
    assert load({"MPWORKER_START_METHOD": "fork"}, mpworker_start_method="spawn").start_method == "fork"
    assert load({"MPWORKER_START_METHOD": ""}, mpworker_start_method="spawn").start_method == "spawn"
    assert load({"MPWORKER_READY_TIMEOUT": "2.5"}).ready_timeout == 2.5


def test_a_size_is_a_whole_number() -> None:
    assert (load().task_log, load(mpworker_task_log=64).task_log, load(mpworker_task_log=0).task_log) == (0, 64, 0)
    assert load({"MPWORKER_TASK_LOG": "16"}, mpworker_task_log=64).task_log == 16


def test_other_keys_are_not_looked_at() -> None:
    assert load({"PATH": "x"}, broker_url="redis://", task_time_limit=3) == load()


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("a.b, c", ("a.b", "c")),
        (" a  b ", ("a", "b")),
        (["a", "b.c"], ("a", "b.c")),
        (("a",), ("a",)),
        ((), ()),
    ],
)
def test_include_takes_text_or_a_list(value: object, names: tuple[str, ...]) -> None:
    assert load(mpworker_include=value).include == names


def test_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(mpworker_data_dir="x").data_dir == tmp_path / "x"
    assert load(mpworker_journal=Path("~/j")).journal_dir == tmp_path / "j"


def test_zero_turns_the_poison_cap_and_the_stall_detector_off() -> None:
    settings = load({"MPWORKER_MAX_DEATHS": "0"}, mpworker_stall_timeout=0)
    assert (settings.max_deaths, settings.stall_timeout) == (0, 0.0)
    settings = load({"MPWORKER_STALL_TIMEOUT": "1.5"}, mpworker_max_deaths=1)
    assert (settings.max_deaths, settings.stall_timeout) == (1, 1.5)


@pytest.mark.parametrize("key", ["mpworker_strat_method", "MPWORKER_STRAT_METHOD"])
def test_an_unknown_key_is_an_error_with_a_suggestion(key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings.load({key: "x"}, {})
    assert str(caught.value) == f"unknown setting {key}; did you mean mpworker_start_method?"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("start_method", "thread"),
        ("start_method", 1),
        ("journal_fsync", "sometimes"),
        ("include", "a-b"),
        ("include", "a..b"),
        ("include", ["a b"]),
        ("data_dir", 5),
        ("ready_timeout", 0),
        ("ready_timeout", "soon"),
        ("ready_timeout", float("nan")),
        ("ready_timeout", float("inf")),
        ("ready_timeout", True),
        ("callback_time_limit", -1),
        ("callback_time_limit", [1]),
        ("max_deaths", -1),
        ("max_deaths", 2.5),
        ("max_deaths", "2.5"),
        ("max_deaths", "often"),
        ("max_deaths", True),
        ("max_deaths", float("inf")),
        ("stall_timeout", -1),
        ("stall_timeout", "soon"),
        ("stall_timeout", False),
        ("stall_timeout", float("nan")),
        ("task_log", -1),
        ("task_log", "much"),
        ("task_log", 1.5),
        ("task_log", True),
        ("task_log", 1 << 20),
        ("worker_env", "CUDA_VISIBLE_DEVICES={slot}"),
        ("worker_env", '["A"]'),
        ("worker_env", ["A"]),
        ("worker_env", {"A": 1.5}),
        ("worker_env", {"A=B": "x"}),
        ("worker_env", {"": "x"}),
        ("worker_env", {"A": "x\0"}),
        ("worker_env", {"A": "{gpu}"}),
        ("worker_env", {"A": "{}"}),
        ("worker_env", {"A": "{slot"}),
        ("worker_env", {"A": "{slot.x}"}),
    ],
)
def test_a_value_that_does_not_fit_is_one_line_that_names_its_origin(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(**{f"mpworker_{name}": value})
    assert str(caught.value).startswith(f"mpworker_{name} must be ")
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)
    if isinstance(value, str):
        with pytest.raises(ConfigurationError, match=rf"^MPWORKER_{name.upper()} must be "):
            load({f"MPWORKER_{name.upper()}": value})


@pytest.mark.parametrize("value", [5, None.__class__, object()])
def test_an_include_that_is_no_list_is_one_line_too(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^mpworker_include must be "):
        load(mpworker_include=value)


def test_unknown_variables_are_told() -> None:
    environ = {"MPWORKER_INCLDUE": "x", "MPWORKER_INCLUDE": "a", "MPWORKER_BROKER_URL": "b", "HOME": "c"}
    environ["MPWORKER_SLOT"] = "0"  # of the worker that a node was started in
    (line,) = unknown_variables(environ)
    assert line == "nothing reads the environment variable MPWORKER_INCLDUE; did you mean MPWORKER_INCLUDE?"


def test_variables_of_slots_are_formats_or_a_callable() -> None:
    formats = {"CUDA_VISIBLE_DEVICES": "{slot}", "NAME": "w{slot:02d}", "LIMIT": 4}
    env = load(mpworker_worker_env=formats).worker_env
    assert env is not None
    assert env(3) == {"CUDA_VISIBLE_DEVICES": "3", "NAME": "w03", "LIMIT": "4"}
    assert pickle.loads(pickle.dumps(env))(12)["NAME"] == "w12"
    text = load({"MPWORKER_WORKER_ENV": '{"PORT": "80{slot}"}'}).worker_env
    assert text is not None
    assert text(1) == {"PORT": "801"}
    given = {"A": str}.get
    assert load(mpworker_worker_env=given).worker_env is given
    assert load(mpworker_worker_env={}).worker_env is None


def test_variables_of_slots_and_a_fork_of_what_is_imported_already_exclude_each_other() -> None:
    with pytest.raises(ConfigurationError, match=r"^mpworker_worker_env and mpworker_start_method = fork exclude .*$"):
        load(mpworker_worker_env={"A": "{slot}"}, mpworker_start_method="fork")


def test_a_callable_is_asked_for_the_slots_of_a_pool_and_of_a_larger_one(caplog: pytest.LogCaptureFixture) -> None:
    four = load(mpworker_worker_env=lambda slot: {"GPU": "abcd"[slot]})
    env = slot_env_of(four, 2)
    assert env == {slot: {"GPU": "abcd"[slot]} for slot in range(4)}
    warn_beyond(env, 4)
    assert not caplog.records
    warn_beyond(env, 5)
    assert caplog.messages == ["workers from slot 4 on get no variables: mpworker_worker_env has none for them"]
    with pytest.raises(ConfigurationError, match=r"^mpworker_worker_env, for slot 4: IndexError: [^\n]*$"):
        slot_env_of(four, 5)
    with pytest.raises(ConfigurationError, match=r"^mpworker_worker_env, for slot 0: [^\n]*$"):
        slot_env_of(load(mpworker_worker_env=lambda slot: [slot]), 1)
    endless = slot_env_of(load(mpworker_worker_env=lambda slot: {"PORT": 8000 + slot}), 300)
    assert isinstance(endless, dict)
    assert endless[299] == {"PORT": "8299"}


@pytest.mark.parametrize(
    ("env", "risk", "method"),
    [(None, "", "fork"), (None, "has 2 threads", "auto"), ({"A": "{slot}"}, "", "forkserver")],
)
def test_with_variables_each_worker_imports_the_application_by_itself(
    env: object, risk: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "risk_of_forking", lambda: risk)
    assert start_method_of(load(mpworker_worker_env=env)) == method
    assert start_method_of(load(mpworker_worker_env=env, mpworker_start_method="spawn")) == "spawn"


def test_who_has_told_celery_to_spawn_need_not_tell_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "risk_of_forking", lambda: "")
    assert start_method_of(load(), forks=False, unplaced=True) == "spawn"
    assert start_method_of(load(mpworker_start_method="forkserver"), forks=False) == "forkserver"


@pytest.mark.parametrize("where", ["an app in no module", "a worker in a thread"])
def test_what_only_this_process_has_is_forked_whatever_its_threads(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "risk_of_forking", lambda: "has 2 threads")
    if where == "an app in no module":
        assert start_method_of(load(), unplaced=True) == "fork"
    else:
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(start_method_of, load()).result() == "fork"
