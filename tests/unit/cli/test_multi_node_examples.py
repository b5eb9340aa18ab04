"""examples/multi-node with commands that stand for ssh, SLURM and MPI: what `erniekit` is started with on each host."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from erniekit.config import load
from erniekit.parallel.mesh import ParallelDims

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples" / "multi-node"
SHOWN = "NNODES MASTER_ADDR MASTER_PORT PADDLE_NODE_RANK SLURM_NODEID OMPI_COMM_WORLD_RANK".split()

STANDINS = {
    # In the token's place its length, wherever it comes from: other users see command lines.
    "erniekit": """
TOKEN=$(cat "${ERNIEKIT_JOB_TOKEN_FILE:-/dev/null}")${ERNIEKIT_JOB_TOKEN:-}; TOKEN=${#TOKEN}
echo "$(for n in NAMES; do printf '%s ' "${!n:--}"; done)$TOKEN| $*" """.replace("NAMES", " ".join(SHOWN)),
    "ssh": """[ "$1" = -tt ]; host=$2; shift 2; echo "on $host: $(bash -c "$*")" """,
    "scontrol": """[ "$1 $2 $3" = "show hostnames node[1-2]" ] && printf 'node1\\nnode2\\n' """,
    "srun": """while [[ $1 == --* ]]; do shift; done; for i in 0 1; do SLURM_NODEID=$i "$@"; done""",
    "mpirun": """
n=$2; shift 2
while true; do case $1 in
  --hostfile|--map-by|--bind-to) shift 2;;
  -x) [[ $2 == *=* ]] && export "$2"; shift 2;;
  *) break;;
esac; done
for ((i = 0; i < n; i++)); do OMPI_COMM_WORLD_RANK=$i "$@"; done""",
}


@pytest.fixture
def run(tmp_path):
    """Run a script where the commands of a cluster are those above; the lines that they print, sorted."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name, text in STANDINS.items():
        (directory / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (directory / name).chmod(stat.S_IRWXU)

    def start(*words, **environ) -> list[str]:
        unset = (*SHOWN, "ERNIEKIT", "ERNIEKIT_JOB_TOKEN")
        clean = {name: value for name, value in os.environ.items() if name not in unset}
        environ = {**clean, "PATH": f"{directory}:{os.environ['PATH']}", **environ}
        done = subprocess.run(["bash", *words], env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return sorted(done.stdout.splitlines())

    return start


def test_ssh(run):
    lines = run(str(EXAMPLES / "ssh.sh"), "x.yaml", "output_dir=a b", HOSTS="gpu01 gpu02", MASTER_PORT="9000")
    assert lines == [
        "on gpu01: 2 gpu01 9000 0 - - 64| train x.yaml output_dir=a b",
        "on gpu02: 2 gpu01 9000 1 - - 64| train x.yaml output_dir=a b",
    ]


def test_ssh_leaves_no_token_behind(run, tmp_path):
    run(str(EXAMPLES / "ssh.sh"), "x.yaml", HOSTS="gpu01")
    assert not list(tmp_path.glob(".erniekit-token-*"))


def test_slurm(run):
    environ = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "41234"}
    lines = run(str(EXAMPLES / "slurm.sbatch"), "x.yaml", "seed=1", **environ)
    assert lines == [f"2 node1 21234 - {node} - 64| train x.yaml seed=1" for node in (0, 1)]


def test_mpi(run, tmp_path):
    (tmp_path / "hosts").write_text("# two of them\nh1 slots=8\n\nh2\n")
    lines = run(str(EXAMPLES / "mpi.sh"), "hosts", "x.yaml", "seed=1")
    assert lines == [f"2 h1 8080 - - {node} 64| train x.yaml seed=1" for node in (0, 1)]


@pytest.mark.parametrize("name", ["kubernetes-job.yaml", "kubernetes-paddlejob.yaml"])
def test_kubernetes_asks_for_as_many_gpus_as_the_yaml_needs(name):
    *_, job = yaml.safe_load_all((EXAMPLES / name).read_text())
    spec = job["spec"]
    spec = {**spec, **spec["paddleReplicaSpecs"]["Worker"]} if "paddleReplicaSpecs" in spec else spec
    container = spec["template"]["spec"]["containers"][0]
    pods = spec.get("completions") or spec["replicas"]
    assert spec.get("parallelism", pods) == pods
    secret = next(entry for entry in container["env"] if entry["name"] == "ERNIEKIT_JOB_TOKEN")
    assert secret["valueFrom"]["secretKeyRef"] == {"name": "erniekit-token", "key": "token"}
    environ = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    assert environ.get("NNODES", str(pods)) == str(pods)
    file = next(word for word in container["command"][-1].split() if word.endswith(".yaml"))
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert ParallelDims.from_config(load(str(ROOT / file), None, "train"), pods * gpus).world == pods * gpus == 96


@pytest.mark.parametrize(
    ("file", "hosts"),
    [
        ("ERNIE-4.5-21B-A3B/pretrain/pretrain_8_gpus.yaml", 1),
        ("ERNIE-4.5-300B-A47B/pretrain/pretrain_96_gpus.yaml", 12),
        ("ERNIE-4.5-300B-A47B/pretrain/pretrain_2016_gpus.yaml", 252),
    ],
)
def test_the_published_layouts_fill_hosts_of_8(file, hosts):
    cfg = load(str(ROOT / "examples" / "configs" / file), None, "train")
    assert ParallelDims.from_config(cfg, hosts * 8).world == hosts * 8
    assert ParallelDims.from_config(cfg, None).world == hosts * 8
