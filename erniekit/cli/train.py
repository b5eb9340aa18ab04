"""`erniekit train`: train the model that a YAML describes."""

from erniekit.cli import launch
from erniekit.utils import log, runtime


def run(args: list[str]) -> int:
    """Train, in this process or in those that the configuration asks for, and return the exit code."""
    cfg = launch.configure(args, "train")
    ignored = [] if launch.is_worker() else runtime.ignored_variables()
    if ignored:
        log.info(
            f"{', '.join(ignored)}: no effect: the parallel degrees in the configuration decide how many processes "
            "train (NNODES, MASTER_ADDR and PADDLE_NODE_RANK describe several hosts)"
        )
    job = None if launch.is_worker() else launch.job_of(cfg, args)
    if job is not None:
        from erniekit.cluster import agent

        return agent.run(job)
    if cfg.max_restarts and not launch.is_supervised():
        log.info(
            "max_restarts: no effect: no agent of ours watches this process; the same command goes on where it was"
        )
    from erniekit.train import stop

    stop.listen()
    from erniekit.train import run as training  # imports Paddle, which takes seconds

    stop.listen()
    training.train(cfg)
    return 0
