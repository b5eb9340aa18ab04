"""The table of sub-commands. A command is in it only if it works, since `erniekit help` prints it."""

from typing import NamedTuple


class Command(NamedTuple):
    """Where a sub-command lives and how `help` shows it."""

    target: str  # "module:function"; the function takes the remaining arguments and returns the exit code
    summary: str
    example: str
    syntax: str = ""  # empty: a configuration file and key=value, as most commands


COMMANDS = {
    "train": Command(
        "erniekit.cli.train:run",
        "train the model that a YAML describes",
        "erniekit train sft.yaml learning_rate=1e-4",
    ),
    "eval": Command(
        "erniekit.cli.eval:run",
        "measure a model on an evaluation set",
        "erniekit eval run_eval.yaml output_dir=./output",
    ),
    "export": Command(
        "erniekit.cli.export:run",
        "turn a training checkpoint into a model directory",
        "erniekit export run_export.yaml format=paddle",
    ),
    "split": Command(
        "erniekit.cli.split:run",
        "write a model again in shards of another size",
        "erniekit split run_export.yaml max_shard_size=2",
    ),
    "convert": Command(
        "erniekit.cli.convert:run",
        "change weights between the -PT and -Paddle layouts",
        "erniekit convert ./in ./out format=pt",
        "erniekit convert SOURCE TARGET format=pt|paddle [max_shard_size=5] [overwrite=true]",
    ),
    "chat": Command(
        "erniekit.cli.chat:run",
        "talk to a model in the terminal",
        "erniekit chat run_chat.yaml temperature=0.7",
    ),
    "version": Command(
        "erniekit.cli.info:version",
        "print the version and the commit",
        "erniekit version",
        "erniekit version",
    ),
    "help": Command(
        "erniekit.cli.info:help",
        "print this text, or that of one command",
        "erniekit help train",
        "erniekit help [COMMAND]",
    ),
}

ALIASES = {"-h": "help", "--help": "help", "-v": "version", "-V": "version", "--version": "version"}
