"""The environment of a worker process."""

from pathlib import Path

import pytest

from erniekit.cluster.job import Job, Layout, Limits
from erniekit.cluster.worker import environment

START = {
    "store": "h:1",
    "first": 2,
    "world": 4,
    "endpoints": ["h:2", "h:3", "h:4", "h:5"],
    "count": 2,
    "hosts": 2,
}


def of(devices: tuple[str, ...], **environ: str) -> dict[str, str]:
    job = Job(("x",), environ, 2, 2, (Layout(4),), Limits(10.0, 10.0), Path("logs"), "token", devices)
    return environment(job, START, 1, 17)


@pytest.mark.parametrize("devices", [(), ("4", "5")], ids=["cpu", "gpus"])
def test_workers_share_the_cores_of_their_host(devices: tuple[str, ...]):
    """Also those that compute on GPUs: packing, tables and checkpoints are a CPU's work."""
    assert of(devices)["ERNIEKIT_NUM_THREADS"] == "8"
    assert of(devices, ERNIEKIT_NUM_THREADS="3")["ERNIEKIT_NUM_THREADS"] == "3"
    assert "ERNIEKIT_NUM_THREADS" not in of(devices, OMP_NUM_THREADS="5")


def test_the_gpu_of_a_worker_is_counted_among_the_visible_ones():
    made = of(("4", "5"), CUDA_VISIBLE_DEVICES="4,5")
    assert made["FLAGS_selected_gpus"] == "1" and made["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert "FLAGS_selected_gpus" not in of(())
    assert made["PADDLE_TRAINER_ID"] == "3" and made["PADDLE_CURRENT_ENDPOINT"] == "h:5"
