"""`erniekit train`: train the model that a YAML describes."""

import signal

from erniekit.checkpoint.model_dir import what_is_saved
from erniekit.cli import launch
from erniekit.utils import log, runtime, stop_signals


def run(args: list[str]) -> int:
    """Train, in this process or in those that the configuration asks for, and return the exit code."""
    cfg = launch.configure(args, "train")
    stop_signals.listen(lambda: what_is_saved(cfg))
    ignored = [] if launch.is_worker() else runtime.ignored_variables()
    if ignored:
        log.info(
            f"{', '.join(ignored)}: no effect: the parallel degrees in the configuration decide how many processes "
            "train (NNODES, MASTER_ADDR and PADDLE_NODE_RANK describe several hosts)"
        )
    job = None if launch.is_worker() else launch.job_of(cfg, args, "train")
    if job is not None:
        from erniekit.cluster import agent

        if job.master is None:  # with several hosts, a spare host may join while the job runs
            launch.require_free(cfg)
        return agent.run(job)
    if cfg.max_restarts and not launch.is_supervised():
        log.info(
            "max_restarts: no effect: erniekit did not start this process, so nothing restarts it; run the same "
            "command to resume"
        )
    # Paddle's own handler of SIGTERM would end the process with a native stack trace before `listen` replaces it.
    with stop_signals.blocked([signal.SIGTERM]), runtime.importing():
        from erniekit.training import run as training  # imports Paddle, which takes seconds

        stop_signals.listen()
    result = training.train(cfg)
    # Ranks exit with 0; their agent has received the Ctrl-C too.
    interrupted = result.summary.get("stopped") == signal.SIGINT.name and not launch.is_supervised()
    return stop_signals.EXIT_INTERRUPTED if interrupted else 0
