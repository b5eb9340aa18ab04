"""From the arguments of a command to a checked configuration, and what is refused before anything starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from erniekit import config
from erniekit.checkpoint.run_record import RunRecord
from erniekit.cli import launch
from erniekit.cluster.job import Master
from erniekit.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
TWO = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def yaml_file(tmp_path: Path):
    """Write a configuration that `export` accepts, with more lines if given, and return its path."""

    def write(*lines: str) -> str:
        path = tmp_path / "run.yaml"
        needed = ["model_name_or_path: ./model", "output_dir: ./out", "fine_tuning: Full"]
        path.write_text("\n".join([*needed, *lines]), encoding="utf-8")
        return str(path)

    return write


def test_a_file_and_overrides_in_both_forms(yaml_file):
    cfg = launch.configure([yaml_file("max_shard_size: 5"), "max_shard_size=2", "--format", "paddle"], "export")
    assert (cfg.model_name_or_path, cfg.max_shard_size, cfg.format) == ("./model", 2, "paddle")


@pytest.mark.parametrize(
    "args",
    [
        ["--model_name_or_path", "./m", "--output_dir", "./out", "--fine_tuning=Full"],
        ["model_name_or_path=./m", "output_dir=./out", "fine_tuning=Full"],
    ],
)
def test_arguments_without_a_file(args: list[str]):
    assert launch.configure(args, "export").model_name_or_path == "./m"


def test_a_path_with_an_equals_sign_is_a_file_if_it_is_there(yaml_file, tmp_path: Path):
    directory = tmp_path / "lr=1"
    directory.mkdir()
    path = Path(yaml_file()).rename(directory / "run.yaml")
    assert launch.configure([str(path)], "export").output_dir == "./out"


def test_no_arguments():
    with pytest.raises(ConfigError, match=r"^Missing configuration files\."):
        launch.configure([], "train")


@pytest.mark.parametrize("name", ["train.py", "train"])
def test_a_file_that_is_neither_yaml_nor_json(name: str):
    with pytest.raises(ConfigError, match=rf"^{name}: .*\.yaml"):
        launch.configure([name], "train")


def test_what_has_no_effect_is_said_once(yaml_file, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(launch.log, "info", said.append)
    cfg = launch.configure([yaml_file("fuse_rope: true")], "export")
    assert said == list(cfg.notes)
    assert len([line for line in said if line.startswith("fuse_rope: no effect")]) == 1


def test_an_unknown_key_is_refused_unless_the_environment_allows_it(yaml_file, monkeypatch: pytest.MonkeyPatch):
    path = yaml_file("no_such_key_at_all: 1")
    with pytest.raises(ConfigError, match="no_such_key_at_all: unknown key"):
        launch.configure([path], "export")
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "Y")
    assert any("no_such_key_at_all" in note for note in launch.configure([path], "export").notes)


def test_what_this_version_cannot_do_is_refused(yaml_file):
    with pytest.raises(ConfigError, match=r"does not support:\n.*use_fp8: True"):
        launch.configure([yaml_file("stage: SFT", "train_dataset_path: x.jsonl", "use_fp8: true")], "train")


@pytest.mark.parametrize("name", ["NNODES", "PADDLE_TRAINERS_NUM"])
def test_only_train_runs_in_several_processes(yaml_file, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "1")
    launch.configure([yaml_file()], "export")
    monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match=rf"{name}=2 .* one process"):
        launch.configure([yaml_file()], "export")


# ---- from degrees and environment to the processes of a job


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The job of a tiny model of experts (4 heads over 2, 8 experts, 4 layers) under the keys and variables given."""
    for name in ("MASTER_ADDR", "MASTER_PORT", *launch._NODE_RANKS):
        monkeypatch.delenv(name, raising=False)

    def make(model: str = "tiny-moe", environ: dict[str, str] | None = None, **keys):
        for name, value in (environ or {}).items():
            monkeypatch.setenv(name, value)
        needed = {"model_name_or_path": f"{ROOT}/examples/models/{model}", "output_dir": str(tmp_path / "out")}
        cfg = config.load(None, needed | {"train_dataset_path": "x.jsonl", "max_steps": 1} | keys)
        return launch.job_of(cfg, ["x.yaml", "seed=1"], "train")

    return make


def test_gpus_come_in_the_order_of_their_numbers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch.metadata, "distribution", lambda name: None)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: (self / f"nvidia{number}" for number in (10, 0, 2)))
    assert launch._devices({}) == ("0", "2", "10")
    assert launch._devices({"CUDA_VISIBLE_DEVICES": "3, 1,-1"}) == ("3", "1")


def test_one_process_stays_this_one(job):
    assert job() is None


def test_the_degrees_decide_the_processes(job, tmp_path: Path):
    made = job(pipeline_parallel_degree=2, tensor_parallel_degree=2, expert_parallel_degree=2, max_restarts=3)
    assert (made.hosts, made.slots, made.master, made.devices) == (1, 8, None, ())
    assert [layout.world for layout in made.layouts] == [8]
    assert made.command[-3:] == ("train", "x.yaml", "seed=1")
    assert made.logs == tmp_path / "out" / "logs"
    assert (made.limits.fault, made.limits.max_restarts) == (30.0, 3)
    assert job(environ={"ERNIEKIT_DIST_LOG": "elsewhere"}, data_parallel_degree=2).logs == Path("elsewhere")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"data_parallel_degree": 3, "expert_parallel_degree": 2}, r"expert_parallel_degree: 2 .*3 / 2 = 1\.50"),
        (
            {"tensor_parallel_degree": 4},
            r"tensor_parallel_degree: 4 does not divide .* 2 key-value heads .2 / 4 = 0\.50",
        ),
        ({"expert_parallel_degree": 3}, r"expert_parallel_degree .*: 3 does not divide .* 8 experts .8 / 3 = 2\.67"),
        ({"pipeline_parallel_degree": 5}, r"5 stages .* the model has 4"),
        ({"pipeline_parallel_degree": 2, "pp_seg_method": "[0,3,9]"}, r"pp_seg_method: .* must run from 0 to 4"),
        ({"model": "tiny-dense", "expert_parallel_degree": 2}, "the model has no experts"),
        ({"environ": {"NNODES": "2"}, "data_parallel_degree": 3}, r"3 / 2 = 1\.50"),
        ({"environ": {"NNODES": "2"}}, r"1 / 2 = 0\.50"),
        ({"environ": {"NNODES": "two"}}, "NNODES=two: not a number"),
        ({"environ": {"NNODES": "²"}}, "NNODES=²: not a number"),
        ({"environ": TWO | {"MASTER_PORT": "²"}, "data_parallel_degree": 2}, "MASTER_PORT=²: not a port"),
        ({"environ": {"NNODES": "2"}, "data_parallel_degree": 2}, "MASTER_ADDR is not set"),
        ({"environ": TWO | {"MASTER_PORT": "99999"}, "data_parallel_degree": 2}, "MASTER_PORT=99999: not a port"),
        ({"environ": TWO | {"MASTER_PORT": "http"}, "data_parallel_degree": 2}, "MASTER_PORT=http: not a port"),
        ({"environ": TWO | {"MASTER_ADDR": "no.such.host.invalid"}, "data_parallel_degree": 2}, "MASTER_ADDR=no.such"),
        ({"environ": TWO | {"PADDLE_NODE_RANK": "2"}, "data_parallel_degree": 2}, "PADDLE_NODE_RANK=2.*from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_process_starts(job, keys: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        job(**keys)


@pytest.mark.parametrize(
    ("environ", "node"),
    [
        ({"RANK": "1"}, 1),  # as PaddleFormers and PyTorchJob have it
        ({"RANK": "1", "PADDLE_NODE_RANK": "0"}, 0),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, None),  # torchrun's number of a process
        ({"NODE_RANK": "1"}, 1),  # as LLaMA-Factory and ms-swift have it
        ({"NODE_RANK": "1", "PADDLE_NODE_RANK": "0", "SLURM_NODEID": "1"}, 0),
    ],
)
def test_the_variables_of_other_tools_number_the_hosts(job, environ: dict, node: int | None):
    assert job(environ=TWO | environ, data_parallel_degree=4).master.node == node


def test_several_hosts(job):
    made = job(environ=TWO | {"SLURM_NODEID": "1"}, data_parallel_degree=4)
    assert (made.hosts, made.slots) == (2, 2)
    assert made.master == Master("127.0.0.1", 8080, 1)
    assert job(environ={"PADDLE_NODE_RANK": "0", "MASTER_PORT": "9000"}, data_parallel_degree=4).master.node == 0


def test_hosts_may_differ_in_where_files_lie_and_in_logging(job):
    """As docs/resuming.md says; the ranks compare what the paths name."""
    other = {"train_dataset_path": "/local/y.jsonl", "dataloader_num_workers": 2, "logging_steps": 5}
    first, second, third = (
        job(environ=TWO, data_parallel_degree=2, **keys).config for keys in ({}, other, other | {"seed": 7})
    )
    assert first == second
    assert {key for key in first if first[key] != third[key]} == {"seed"}


def test_an_elastic_job_keeps_its_global_batch(job):
    """D * accumulation stays 12: 4 x 3, 2 x 6 (3 data ranks do not make whole expert groups of 2), never 1."""
    keys = {"data_parallel_degree": 4, "gradient_accumulation_steps": 3, "expert_parallel_degree": 2}
    layouts = job(elastic=True, **keys).layouts
    assert [layout.world for layout in layouts] == [4, 2]
    assert layouts[1].overrides == ("--data_parallel_degree=2", "--gradient_accumulation_steps=6")
    assert "still 12 rows a step" in layouts[1].note


def test_an_elastic_job_that_learns_from_rewards_may_have_any_number_of_data_ranks(job):
    """A step has the completions of its prompts, however many ranks share them."""
    rl = {"stage": "RL", "reward_funcs": "length", "data_parallel_degree": 3, "rollout_batch_size": 6}
    layouts = job(elastic=True, **rl).layouts
    assert [layout.world for layout in layouts] == [3, 2, 1]
    assert [layout.overrides for layout in layouts[1:]] == [
        ("--data_parallel_degree=2",),
        ("--data_parallel_degree=1",),
    ]
    assert layouts[1].note.startswith("elastic: 2 data ranks instead of 3: still the same completions a step")


def test_an_elastic_job_that_shards(job):
    keys = {"data_parallel_degree": 2, "sharding_parallel_degree": 2, "sharding": "stage1"}
    layouts = job(elastic=True, **keys).layouts
    assert [layout.world for layout in layouts] == [4, 2, 1]
    words = "--data_parallel_degree=1 --gradient_accumulation_steps=2 --sharding_parallel_degree=2"
    assert " ".join(layouts[1].overrides) == words


def test_a_restart_keeps_what_was_saved(job, tmp_path: Path):
    again = job(data_parallel_degree=2, overwrite_output_dir=True, resume_from_checkpoint="none").again
    out = tmp_path / "out"
    out.mkdir()
    assert again() == [], "nothing has begun: what was asked for has still to be done"
    record = RunRecord({})
    record.begin(0)
    record.write(out)
    assert again() == ["--overwrite_output_dir=false"]
    (out / "abandoned-1" / "checkpoint-4").mkdir(parents=True)
    assert again() == ["--overwrite_output_dir=false"]
    (out / "checkpoint-2").mkdir()
    assert again()[:2] == ["--overwrite_output_dir=false", "--resume_from_checkpoint=auto"]


def test_a_restart_ignores_nothing_of_what_the_job_saved(job, tmp_path: Path):
    """The keys ignore_* are about the checkpoint that the job began with: it has not yet been trained further."""
    out = tmp_path / "out"
    (out / "checkpoint-2").mkdir(parents=True)
    again = job(data_parallel_degree=2, ignore_data_skip=True).again
    record = RunRecord({})
    record.begin(2)
    record.write(out)
    assert again() == ["--overwrite_output_dir=false", "--resume_from_checkpoint=auto"]
    (out / "checkpoint-4").mkdir()
    assert again()[2:] == ["--ignore_load_lr_and_optim=false", "--ignore_data_skip=false"]


def test_python_callers_are_sent_to_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    keys = {"model_name_or_path": f"{ROOT}/examples/models/tiny-moe", "output_dir": str(tmp_path)}
    cfg = config.load(None, keys | {"train_dataset_path": "x.jsonl", "max_steps": 1, "data_parallel_degree": 2})
    with pytest.raises(ConfigError, match="`erniekit train"):
        launch.check(cfg, "train")
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    launch.check(cfg, "train")


def test_a_worker_without_its_rank_is_told(yaml_file, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    monkeypatch.delenv("PADDLE_TRAINER_ID", raising=False)
    with pytest.raises(ConfigError, match=r"PADDLE_TRAINER_ID=\(not set\)"):
        launch.configure([yaml_file()], "train")


def test_planning_a_job_leaves_paddle_out(tmp_path: Path):
    code = (
        "import sys; from erniekit import config; from erniekit.cli import launch; from erniekit.cluster import agent;"
        f"cfg = config.load(None, dict(model_name_or_path='{ROOT}/examples/models/tiny-moe', output_dir='out',"
        "train_dataset_path='x', max_steps=1, data_parallel_degree=2));"
        "assert launch.job_of(cfg, [], 'train').slots == 2; assert 'paddle' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
