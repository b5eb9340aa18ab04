"""The table of sub-commands. A command is in it only if it works, since `erniekit help` prints it."""

from typing import NamedTuple


class Command(NamedTuple):
    """A sub-command: the function that runs it, and its texts for `help`."""

    target: str  # "module:function": takes the arguments and returns the exit code, unless takes_config is set
    summary: str
    example: str
    syntax: str = ""  # empty: a configuration file and key=value, as for most commands
    options: tuple[str, ...] = ()  # options that are not keys, as "name=DEFAULT: what it does"
    takes_config: bool = False  # the function takes the Config made from the arguments; its result is ignored


COMMANDS = {
    "train": Command(
        "erniekit.cli.train:run",
        "train the model that a YAML describes",
        "erniekit train sft.yaml learning_rate=1e-4",
    ),
    "check": Command(
        "erniekit.cli.check:run",
        "report what is wrong with a YAML and its data, without training",
        "erniekit check sft.yaml max_seq_len=8192",
        "erniekit check CONFIG.yaml [key=value ...] [command=train] [strict=true] [json=OUT.json]\n"
        "       [decode=true] [preview=N] [first=1] [sheet=OUT.png] [records=OUT.json]",
        (
            "command=train: the command that the file is for: train, eval, export, split, chat or server",
            "strict=false: true: warnings alone make the exit code 3 (errors make it 1)",
            "json=FILE: also write the report to this file",
            "decode=false: true: also decode every picture and video, which takes as long as reading all of them",
            "preview=N: show this number of records as the model gets them, with a sheet of pictures; else one",
            "first=1: the number of the first record that is shown",
            "records=FILE: also write the records that are shown to this file: tokens, what is trained, pictures",
            "sheet=preview.png: where preview draws their pictures, resized and with the boxes of the answers",
        ),
    ),
    "plan": Command(
        "erniekit.cli.plan:run",
        "plan a run: whether it fits the GPUs and how long it takes, without weights and without a GPU",
        "erniekit plan sft.yaml gpus=96 gpu=H800",
        "erniekit plan CONFIG.yaml [key=value ...] [gpus=N] [gpu=NAME] [gpus_per_node=8] [json=OUT.json]\n"
        "       [search=true] [chart=OUT.png] [tokens=N] [memory=GB] [document_tokens=N] [picture_tokens=N]\n"
        "       [hardware=CARDS.yaml] [timeline=OUT.png] [trace=OUT.json]\n"
        "       erniekit plan calibrate CARDS.yaml [overwrite=true]",
        (
            "gpus=N: GPUs in all; else as many as the parallel degrees multiply to",
            "gpu=H800: their name, such as A100, H100, H20, L20, RTX4090, or cpu for this machine's processors",
            "gpus_per_node=8: GPUs of one host",
            "search=false: true: also propose degrees, microbatch, recompute and schedule: the fastest that fit",
            "json=FILE: also write bytes by stage and kind, seconds by kind, FLOPs and MFU to this file",
            "chart=FILE: also draw memory by stage and kind, and time by kind, as a PNG file",
            "tokens=N: tokens of the whole training, for days and GPU-hours; else max_steps decides",
            "memory=GB: the memory of one GPU in units of 10^9 bytes, where it is not that of the card's name",
            "document_tokens=N: the length of the documents in a row; else a row is one document",
            "picture_tokens=N: tokens of a row that stand for pictures; else half of it, where the method has them",
            "hardware=FILE: a YAML file with other cards (docs/plan.md); `plan calibrate` measures this machine",
            "overwrite=false: true: `plan calibrate` replaces a file that exists",
            "timeline=FILE: also simulate the step with jitter on every rank and draw its pipeline, as a PNG file",
            "trace=FILE: also write that step as a Chrome trace, which opens in Perfetto",
        ),
    ),
    "eval": Command(
        "erniekit.evaluate.run:evaluate",
        "evaluate a model on a data set or a benchmark",
        "erniekit eval run_eval.yaml output_dir=./output",
        takes_config=True,
    ),
    "export": Command(
        "erniekit.evaluate.quantised:export_and_report",
        "turn a training checkpoint into a model directory",
        "erniekit export run_export.yaml format=paddle",
        takes_config=True,
    ),
    "split": Command(
        "erniekit.export.split:split",
        "rewrite a model with weight files of another size",
        "erniekit split run_export.yaml max_shard_size=2",
        takes_config=True,
    ),
    "convert": Command(
        "erniekit.cli.convert:run",
        "convert weights between the -PT and -Paddle layouts",
        "erniekit convert ./in ./out format=pt",
        "erniekit convert SOURCE TARGET format=pt|paddle [max_shard_size=5] [overwrite=true]",
        (
            "format: the layout to write: pt (Hugging Face) or paddle",
            "max_shard_size=5: the largest weight file, in GB, or with its unit (500MB, 2GiB)",
            "overwrite=false: true: replace another model in TARGET",
        ),
    ),
    "tokenize": Command(
        "erniekit.cli.tokenize:run",
        "turn text into token files for pretraining",
        "erniekit tokenize corpus/*.jsonl tokenizer=./model output=./tokens/part0",
        "erniekit tokenize TEXT... tokenizer=MODEL output=PREFIX [workers=1] [append_eos=true]\n"
        "       [on_bad_line=error|skip] [overwrite=false] [note_every=5]",
        (
            "tokenizer: a model directory, or a Hub name",
            "output: the files are PREFIX.bin and PREFIX.idx",
            "workers=1: processes that tokenize; 0: this process alone",
            "append_eos=true: put the tokenizer's end token after each document",
            "on_bad_line=error: skip: leave bad records out and count them",
            "overwrite=false: true: replace other token files",
            "note_every=5: seconds between records of the progress, from which a stopped command resumes",
        ),
    ),
    "chat": Command(
        "erniekit.serve.chat:chat",
        "chat with a model in the terminal, also about pictures (<image>path</image>, /image path)",
        "erniekit chat run_chat.yaml temperature=0.7",
        takes_config=True,
    ),
    "server": Command(
        "erniekit.serve.server:serve",
        "serve a model over OpenAI's HTTP API (`erniekit serve` is another name)",
        "erniekit server run_chat.yaml port=8188",
        takes_config=True,
    ),
    "webui": Command(
        "erniekit.cli.webui:run",
        "open a board in the browser: write a YAML, start and watch runs, inspect data, chat",
        "erniekit webui runs=./runs",
        "erniekit webui [runs=./runs] [host=127.0.0.1] [port=7860] [allow=DIR,DIR] [allowed_hosts=NAME,NAME]\n"
        "       [api_key_file=FILE]",
        (
            "runs=./runs: the directory of the runs, one board at a time",
            "host=127.0.0.1: the address that the board listens to; one that other machines reach needs a key",
            "port=7860: its port; 0: a free one",
            "allow=DIR,DIR: directories beside the working directory and runs to which a YAML may point",
            "allowed_hosts=NAME,NAME: further names by which browsers on this machine may address it",
            "api_key_file=FILE: a file with one key a line, instead of the key that the board makes for itself",
        ),
    ),
    "version": Command(
        "erniekit.cli.info:version",
        "print the version and the commit",
        "erniekit version",
        "erniekit version",
    ),
    "help": Command(
        "erniekit.cli.info:help",
        "print this text, that of one command, or what a key means",
        "erniekit help train",
        "erniekit help [COMMAND or KEY]",
    ),
}

ALIASES = {"serve": "server", "-h": "help", "--help": "help", "-v": "version", "-V": "version", "--version": "version"}
