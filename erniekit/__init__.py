"""erniekit: pretrain, fine-tune, evaluate and export ERNIE 4.5 models on PaddlePaddle.

`LLM`, `SamplingParams`, `load_model`, `load_processor`, `save_model` and `train` come from erniekit/api.py on first
use, so that importing erniekit imports neither Paddle nor anything else heavy.
"""

# ruff: noqa: E402  what the command needs comes before other modules are looked for
import sys

_as_module = sys.argv[:1] == ["-m"] and ("-m", "erniekit") in zip(sys.orig_argv, sys.orig_argv[1:])
if _as_module and not (sys.version_info >= (3, 11) and sys.flags.safe_path):
    # `python -m erniekit` looks into the working directory first: last, so that a json.py there does not stand in for
    # the library's. Here and not in __main__, which Python imports after this file.
    sys.path.append(sys.path.pop(0))

import signal

_as_command = _as_module or "".join(sys.argv[:1]).endswith("/erniekit")
if _as_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # until the command installs its handlers, Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from typing import TYPE_CHECKING, Any

from erniekit.utils.version import __version__

if TYPE_CHECKING:
    from erniekit.api import LLM, SamplingParams, load_model, load_processor, save_model, train

__all__ = ["LLM", "SamplingParams", "__version__", "load_model", "load_processor", "save_model", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from erniekit.utils import runtime

        runtime.prepare()  # api imports Paddle, which reads these settings once
        from erniekit import api

        return vars(api)[name]
    raise AttributeError(f"module 'erniekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
