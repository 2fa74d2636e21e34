"""The size of a pool follows what the machine really leaves us: affinity and cgroup quotas, on made-up files."""

from __future__ import annotations

import os
from math import inf
from pathlib import Path

import pytest

from mpworker import ProcessPool, pool_size
from mpworker.errors import ConfigurationError
from mpworker.pool import cpus

V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "5:memory:/a\n4:cpu,cpuacct:/a/b\n3:cpuset:/\n1:name=systemd:/a:b\n"}


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


FILES = [
    ({}, inf),
    (V2, inf),
    (V2 | {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, inf),
    (V2 | {"sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
    (V2 | {"sys/fs/cgroup/a/b/cpu.max": "400000 100000\n", "sys/fs/cgroup/a/cpu.max": "250000 100000\n"}, 2.5),
    # In a container, the path may be that of the host, and our own cgroup the top.
    (V2 | {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
    ({"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
    (V2 | {"sys/fs/cgroup/a/b/cpu.max": "garbage\n"}, inf),
    (V2 | {"sys/fs/cgroup/a/b/cpu.max": "100000 0\n"}, inf),
    ({"proc/self/cgroup": "garbage\n"}, inf),
    (V1, inf),
    (V1 | v1("sys/fs/cgroup/cpu/a/b", -1), inf),
    (V1 | v1("sys/fs/cgroup/cpu/a/b", 300_000), 3),
    (V1 | v1("sys/fs/cgroup/cpu/a/b", 300_000) | v1("sys/fs/cgroup/cpu/a", 50_000, 25_000), 2),
    (V1 | v1("sys/fs/cgroup/cpu,cpuacct", 20_000), 0.2),
]


@pytest.mark.parametrize(("files", "quota"), FILES)
def test_the_strictest_quota_counts(files: dict[str, str], quota: float, tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cpus._quota(tmp_path) == quota


@pytest.mark.parametrize(
    ("allowed", "quota", "size"), [(4, inf, 4), (4, 1.5, 2), (4, 2.0, 2), (2, 3.5, 2), (4, 0.1, 1), (1, inf, 1)]
)
def test_a_quota_is_rounded_up_and_affinity_is_not_exceeded(
    allowed: int, quota: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    monkeypatch.setattr(cpus, "_quota", lambda _: quota)
    assert (pool_size(), pool_size("cpu"), pool_size("io")) == (size, size, 2 * size)
    assert ProcessPool()._options.size == size


def test_without_affinity_all_cpus_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert pool_size() == 1


def test_another_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^kind must be "):
        pool_size("gpu")  # type: ignore[arg-type]
