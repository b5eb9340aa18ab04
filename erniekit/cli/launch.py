"""Prepares a command: loads its configuration and decides which processes run it.

`erniekit train`, `eval` or `chat` in a shell either does the work in this one process, or acts as the agent of this
host, which starts and supervises worker processes (erniekit/cluster). The parallel degrees decide which, before Paddle
is imported. The other commands process files tensor by tensor in one process. A process with PADDLE_TRAINERS_NUM and
PADDLE_TRAINER_ID in its environment is a worker, started by such an agent or by `python -m paddle.distributed.launch`.
"""

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

from erniekit import config
from erniekit.checkpoint.model_dir import list_checkpoints
from erniekit.checkpoint.model_files import model_files
from erniekit.checkpoint.model_shape import directories, model_config
from erniekit.checkpoint.run_record import start_id
from erniekit.cluster import net
from erniekit.cluster.job import Job, Layout, Limits, Master
from erniekit.config import Config
from erniekit.config.per_host import compared
from erniekit.config.schema import fields
from erniekit.hub import resolve_tokenizer
from erniekit.models.pipeline_layout import check_layout, chunks_to_use
from erniekit.parallel.mesh import ParallelDims
from erniekit.utils import heartbeat, job_token, log, runtime
from erniekit.utils.addresses import is_loopback
from erniekit.utils.directory_lock import DirectoryLock, make_directory
from erniekit.utils.errors import ConfigError
from erniekit.utils.version import __version__
from erniekit.utils.wording import count_of

_PROCESS_COUNTS = ("NNODES", "PADDLE_TRAINERS_NUM")
# The variables that give a host's number: the user's, and those of schedulers that start one process per host.
_NODE_RANKS = (
    "PADDLE_NODE_RANK",
    "NODE_RANK",
    "SLURM_NODEID",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "JOB_COMPLETION_INDEX",
)
# Commands that run on several processes if the degrees of their configuration require it.
ON_RANKS = ("train", "eval", "chat")
_AGENT = "ERNIEKIT_AGENT"  # from the agent to its workers: "process id:file descriptor of the heartbeat's memory"


def configure(args: list[str], command: str) -> Config:
    """Load the configuration of a command line, log the keys that have no effect, and refuse what is not possible.

    Commands import Paddle, which takes seconds, only after this, so that a mistake in the file is reported at once.

    Args:
        args: what follows the sub-command: a YAML or JSON file and key=value, or --key value.
        command: the sub-command.

    Raises:
        ConfigError: the arguments, the file or a key is wrong, or requests what this version does not support.
    """
    if command in ON_RANKS and is_worker():
        _begin_worker(os.environ)
    path, overrides = read_arguments(args)
    cfg = config.load(path, overrides, command, allow_extra=allows_extra())
    log_notes(cfg)
    config.require_supported(cfg, command)
    if command not in ON_RANKS:
        _require_one_process(os.environ, f"`erniekit {command}`")
    return cfg


def log_notes(cfg: Config) -> None:
    """Log once per run which keys of the configuration have no effect, and why."""
    if not is_supervised():  # otherwise the agent has logged it
        for note in cfg.notes:
            log.info(note)


def check(cfg: Config, command: str) -> None:
    """Refuse a configuration, or an environment, that a Python caller cannot run in this process.

    Raises:
        ConfigError: names what is not possible.
    """
    config.require_supported(cfg, command)
    if not is_worker() and job_of(cfg, [], command) is not None:
        raise ConfigError(
            "erniekit.train trains in the process that calls it, and this configuration needs several. Use the command "
            f"`erniekit train {cfg.source or 'FILE.yaml'}`, which starts them."
        )


def is_worker() -> bool:
    """Whether an agent, or Paddle's launcher, started this process as one of its ranks."""
    return is_supervised() or _count(os.environ, "PADDLE_TRAINERS_NUM") > 1


def is_supervised() -> bool:
    """Whether erniekit's own agent started this process and supervises it."""
    return _AGENT in os.environ


def degrees_of(cfg: Config, command: str = "train") -> ParallelDims:
    """The parallel degrees of the whole job, on the GPUs of all hosts if there are any. `chat` uses one copy of the
    model, whatever the number of GPUs.

    Raises:
        ConfigError: they do not multiply to the number of processes, there are fewer GPUs, or one does not divide the
            data ranks.
    """
    devices = _devices(os.environ)
    num_gpus = _count(os.environ, "NNODES") * len(devices)
    if command == "eval":
        cfg = replace(cfg, context_parallel_degree=-1)  # every data rank has whole rows
    if command != "chat":
        return ParallelDims.from_config(cfg, num_gpus if devices else None)
    degrees = ParallelDims.of_one_copy(cfg)
    if devices and degrees.world > num_gpus:
        raise ConfigError(
            f"pipeline_parallel_degree {degrees.pipeline} * expert_parallel_degree {degrees.expert} * "
            f"tensor_parallel_degree {degrees.tensor} = {degrees.world} processes, but this host has "
            f"{count_of(num_gpus, 'GPU')}. Lower a degree, or start on more hosts (NNODES)."
        )
    return degrees


def has_gpus() -> bool:
    """Whether workers would run on GPUs."""
    return bool(_devices(os.environ))


def read_arguments(args: list[str]) -> tuple[str | None, list[str]]:
    """The configuration file of a command line, if it names one, and the overrides."""
    return (args[0], args[1:]) if args and _is_file(args[0]) else (None, args)


def allows_extra() -> bool:
    """Whether an environment variable allows unknown keys."""
    return _is_on(os.environ.get("ALLOW_EXTRA_ARGS", ""))


def job_of(cfg: Config, args: list[str], command: str) -> Job | None:
    """The job that this host has to start for `command`; None if this process suffices.

    Args:
        args: what follows the command on the command line, for the workers.

    Raises:
        ConfigError: the degrees, the model and the hosts do not fit together, or the environment is wrong.
        CheckpointError: the model cannot be found, or its config.json is wrong.
    """
    environ = os.environ
    hosts, devices = _count(environ, "NNODES"), _devices(environ)
    degrees = degrees_of(cfg, command)
    if degrees.world == 1 and hosts == 1:
        return None
    slots, rest = divmod(degrees.world, hosts)
    if rest:
        raise ConfigError(
            f"NNODES={hosts} hosts cannot share {degrees.world} processes (pipeline {degrees.pipeline} * data "
            f"{degrees.data} * tensor {degrees.tensor}) evenly: {degrees.world} / {hosts} = "
            f"{degrees.world / hosts:.2f}. Change a degree (data_parallel_degree adds processes), or NNODES."
        )
    _check_model(cfg, degrees, command)
    master = _master(environ, hosts)
    trains, output_dir = command == "train", Path(cfg.output_dir or "")
    restarts = (cfg.max_restarts, cfg.elastic) if trains else (0, False)
    return Job(
        command=runtime.python_command("from erniekit.cli.main import main; sys.exit(main())", command, *args),
        environ=dict(environ),
        hosts=hosts,
        slots=slots,
        layouts=_layouts(cfg, degrees) if trains else (Layout(degrees.world),),
        limits=Limits(cfg.distributed_timeout, cfg.rendezvous_timeout, *restarts),
        token=_token(environ, master),
        logs=Path(environ.get("ERNIEKIT_DIST_LOG") or _logs(cfg, command)).expanduser(),
        devices=devices,
        master=master,
        config=_comparable(cfg, slots, command),
        again=partial(_resume_arguments, output_dir, start_id(output_dir), _saved(output_dir)) if trains else list,
        reads_terminal=command == "chat",
    )


def _logs(cfg: Config, command: str) -> Path:
    """The directory for the logs of ranks other than 0; a training's logs are kept in output_dir."""
    output = (cfg.eval_output if command == "eval" else None) or cfg.output_dir
    parent = runtime.cache_directory() if output is None else Path(output)
    return parent / "logs" if command == "train" else parent / "logs" / command


def require_free(cfg: Config) -> None:
    """Raise ConfigError if output_dir cannot be created, or if a running job uses it: new workers would overwrite its
    logs.
    """
    assert cfg.output_dir, "config.load requires it to train"
    make_directory(Path(cfg.output_dir), "output_dir")
    DirectoryLock(Path(cfg.output_dir)).require_free()


def _check_model(cfg: Config, degrees: ParallelDims, command: str) -> None:
    """Download the model once for all workers of this host, and check that the degrees divide it."""
    if command == "train":
        check_layout(cfg, degrees, model_config(cfg, directories(cfg)[0]))
        return
    if cfg.tokenizer_name_or_path:
        resolve_tokenizer(cfg.tokenizer_name_or_path, cfg.download_hub)
    chunks_to_use(cfg, model_files(cfg).config(cfg), degrees, stage=0)


def _layouts(cfg: Config, degrees: ParallelDims) -> tuple[Layout, ...]:
    """The layout of the whole job, and the smaller layouts that an elastic job may shrink to. All have the same steps:
    a smaller one has fewer data ranks and more accumulation steps, or more microbatches of the same completions.
    """
    layouts = [Layout(degrees.world)]
    if not cfg.elastic:
        return tuple(layouts)
    accumulates = cfg.method.reads("gradient_accumulation_steps")
    batches = cfg.gradient_accumulation_steps * degrees.batch
    for batch in range(degrees.batch - 1, 0, -1):
        data = batch * degrees.context
        if data % degrees.expert or (accumulates and batches % batch):
            continue
        # A degree of 1 or -1 needs no override: either nothing is sharded, or it is over all data ranks.
        sharding = math.gcd(cfg.sharding_parallel_degree, batch) if cfg.sharding_parallel_degree > 1 else 1
        overrides = [f"--data_parallel_degree={batch // sharding}"]
        note = f"{count_of(data, 'data rank')} instead of {degrees.data}"
        if accumulates:
            overrides.append(f"--gradient_accumulation_steps={batches // batch}")
            note += (
                f", gradient_accumulation_steps {batches // batch} instead of {cfg.gradient_accumulation_steps}: still "
                f"{batches * cfg.batch_size} rows a step, and slower steps"
            )
        else:
            note += ": still the same completions a step, and slower steps"
        if cfg.sharding_parallel_degree > 1:
            overrides.append(f"--sharding_parallel_degree={sharding}")
        layouts.append(Layout(degrees.pipeline * data * degrees.tensor, tuple(overrides), f"elastic: {note}"))
    return tuple(layouts)


def _comparable(cfg: Config, slots: int, command: str) -> dict[str, str]:
    """The settings that must be equal on all hosts. Later the ranks compare the files that other keys name."""
    values = {name: repr(vars(cfg)[name]) for name in compared(command, list(fields()))}
    return values | {"erniekit's version": __version__, "processes a host": str(slots)}


def _resume_arguments(output_dir: Path, start: str | None, saved_before: dict[Path, int]) -> list[str]:
    """The additional arguments of a restarted worker.

    Once a worker has begun to train (run.json then names another start than `start`, which an earlier run left), a
    restarted worker keeps what was saved and resumes from it. Before that there are no additional arguments, since the
    configuration's own settings for output_dir, such as overwrite_output_dir, have not been carried out yet. For the
    same reason what it ignores of a checkpoint is ignored of those in `saved_before` alone, and not of the job's own.
    """
    if start_id(output_dir) == start:
        return []
    arguments, saved = ["--overwrite_output_dir=false"], list(_saved(output_dir).items())
    if saved:
        arguments.append("--resume_from_checkpoint=auto")
    if saved and saved[-1] not in saved_before.items():
        arguments += ["--ignore_load_lr_and_optim=false", "--ignore_data_skip=false"]
    return arguments


def _saved(output_dir: Path) -> dict[Path, int]:
    """The checkpoints in a directory, oldest first, and when each was written (in nanoseconds): another one may have
    the same name.
    """
    saved = {}
    for path in list_checkpoints(output_dir):
        with contextlib.suppress(FileNotFoundError):  # a running job has removed it
            saved[path] = path.stat().st_mtime_ns
    return saved


def _master(environ: Mapping[str, str], hosts: int) -> Master | None:
    """The address at which the hosts meet, and this host's number."""
    if hosts == 1:
        return None
    name = environ.get("MASTER_ADDR", "").strip()
    if not name:
        raise ConfigError(
            f"NNODES={hosts}, but MASTER_ADDR is not set. Set it to the name or address of the first host, and "
            "MASTER_PORT to a free port there, the same on every host."
        )
    text = environ.get("MASTER_PORT", "").strip() or "8080"
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ConfigError(f"MASTER_PORT={text}: not a port. Give a whole number from 1024 to 65535.")
    return Master(net.resolve(name), int(text), _node_rank(environ, hosts))


def _token(environ: Mapping[str, str], master: Master | None) -> str:
    """The job's token: the user gives it for several hosts; on one host the agent makes it for its workers."""
    if master is None:
        return job_token.new()
    on_this_machine = is_loopback(master.address)
    return job_token.find(environ, runtime.cache_directory() if on_this_machine else None)


def _node_rank(environ: Mapping[str, str], hosts: int) -> int | None:
    names = (*_NODE_RANKS, "RANK") if runtime.rank_numbers_hosts(environ) else _NODE_RANKS
    name = next((name for name in names if environ.get(name, "").strip()), None)
    if name is None:
        return None
    text = environ[name].strip()
    if not text.isdecimal() or int(text) >= hosts:
        raise ConfigError(
            f"{name}={text}, but with NNODES={hosts} the hosts are numbered from 0 to {hosts - 1}. Start one "
            "`erniekit` a host; PADDLE_NODE_RANK takes precedence over the scheduler's number."
        )
    return int(text)


def _devices(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs for the workers, one each; empty if Paddle was built for the CPU. Not yet run on a machine with GPUs."""
    try:
        metadata.distribution("paddlepaddle-gpu")
    except metadata.PackageNotFoundError:
        return ()
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        names = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
        return tuple(sorted(names, key=lambda name: (len(name), name)))  # 2 before 10
    return tuple(name.strip() for name in visible.split(",") if name.strip() not in ("", "-1"))


def _begin_worker(environ: Mapping[str, str]) -> None:
    """Put the rank into the log lines, and start the heartbeat if an agent supervises this process."""
    rank = environ.get("PADDLE_TRAINER_ID", "").strip()
    if not rank.isdecimal() or int(rank) >= _count(environ, "PADDLE_TRAINERS_NUM"):
        raise ConfigError(
            f"PADDLE_TRAINERS_NUM={environ['PADDLE_TRAINERS_NUM']} says that a launcher started this process, but "
            f"PADDLE_TRAINER_ID={rank or '(not set)'} is not one of its ranks. Unset both, and set the degrees: "
            "`erniekit train` starts the processes itself."
        )
    log.set_rank(int(rank))
    agent, _, beat = environ.get(_AGENT, "").partition(":")
    if beat:
        heartbeat.start(int(beat), int(agent), streams=rank == "0")


def _require_one_process(environ: Mapping[str, str], command: str) -> None:
    for name in _PROCESS_COUNTS:
        if _count(environ, name) > 1:
            raise ConfigError(
                f"{name}={environ[name]} is set in the environment, but {command} runs in one process. "
                f"Unset {name}, or set it to 1."
            )


def _count(environ: Mapping[str, str], name: str) -> int:
    """The number of hosts or processes in a variable; 1 if it is not set."""
    text = environ.get(name, "").strip()
    if text in ("", "0"):
        return 1
    if not text.isdecimal():
        raise ConfigError(f"{name}={text}: not a number. Give a whole number from 1, or unset it.")
    return int(text)


def _is_file(arg: str) -> bool:
    """Whether the argument is a configuration file's name (the file need not exist) and not an option."""
    return not arg.startswith("--") and ("=" not in arg or Path(arg).is_file())


def _is_on(value: str) -> bool:
    return value.strip().lower() in ("true", "y", "yes", "1")
