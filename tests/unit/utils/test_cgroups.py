"""Limits of control groups, read from directories laid out as Linux lays them out."""

import pytest

from erniekit.utils import cgroups, host_memory, runtime


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that lays out /proc/self/cgroup and files below /sys/fs/cgroup."""

    def lay_out(own: str, **files: str) -> None:
        monkeypatch.setattr(cgroups, "_ROOT", tmp_path / "cgroup")
        monkeypatch.setattr(cgroups, "_OWN", tmp_path / "own")
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name.replace("__", "/").replace("DOT", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")

    return lay_out


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpuDOTmax": "400000 100000"}, 4.0),  # a container with a name space of its own
        ("0::/\n", {"cpuDOTmax": "max 100000"}, None),
        ("0::/\n", {}, None),
        ("0::/docker/1f\n", {"cpuDOTmax": "150000 100000"}, 1.5),  # the path is the host's and not there
        # the group itself has no limit, the one above it has
        ("0::/job/step\n", {"job__step__cpuDOTmax": "max 100000", "job__cpuDOTmax": "50000 100000"}, 0.5),
        # version 1, with two controllers in one hierarchy
        (
            "4:cpu,cpuacct:/pod\n1:name=systemd:/\n",
            {"cpu__pod__cpuDOTcfs_quota_us": "200000", "cpu__pod__cpuDOTcfs_period_us": "100000"},
            2.0,
        ),
        ("4:cpu:/\n", {"cpu__cpuDOTcfs_quota_us": "-1", "cpu__cpuDOTcfs_period_us": "100000"}, None),
        ("4:cpu:/\n0::/\n", {"cpuDOTmax": "300000 100000"}, 3.0),
        ("4:cpuset:/a\n", {"cpu__a__cpuDOTcfs_quota_us": "1", "cpu__a__cpuDOTcfs_period_us": "1"}, None),
    ],
)
def test_quota_of_processor_time(machine, own, files, quota):
    machine(own, **files)
    assert cgroups.cpu_quota() == quota


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (0.1, 1), (1.0, 1), (1.5, 2), (64.0, 8)])
def test_threads_that_a_quota_feeds(quota, cores):
    assert cgroups.processors_of(quota, 8) == cores


def test_threads_do_not_exceed_the_quota_of_a_container(machine, monkeypatch):
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda pid: set(range(64)))
    machine("0::/\n", cpuDOTmax="400000 100000")
    assert runtime.num_cores() == 4
    machine("0::/\n", cpuDOTmax="max 100000")
    assert runtime.num_cores() == 64


def test_memory_of_a_job_is_the_smallest_limit_above_it(machine):
    whole = host_memory.host_memory()
    machine("0::/slurm/job_7/step_0\n", slurm__job_7__memoryDOTmax="1000000", slurm__memoryDOTmax="max")
    assert host_memory.host_memory() == 1_000_000 < whole
    machine("9:memory:/a\n", memory__a__memoryDOTlimit_in_bytes="2000000", memory__memoryDOTlimit_in_bytes=str(2**63))
    assert host_memory.host_memory() == 2_000_000
