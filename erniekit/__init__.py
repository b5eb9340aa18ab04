"""erniekit: pretrain, fine-tune, evaluate and export ERNIE 4.5 models on PaddlePaddle.

`load_model`, `save_model` and `train` come from erniekit/api.py on first use, so that importing erniekit imports
neither Paddle nor anything else heavy.
"""

import sys

if (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[1 + sys.orig_argv.index("-m") :][:1] == ["erniekit"]
    and not (sys.version_info >= (3, 11) and sys.flags.safe_path)
):
    # `python -m erniekit` looks into the working directory first: last, so that a json.py there does not stand in for
    # the library's. Here and not in __main__, which Python imports after this file.
    sys.path.append(sys.path.pop(0))

import types
import warnings
from typing import TYPE_CHECKING, Any

from erniekit import train as _train_package
from erniekit.utils import runtime
from erniekit.utils.version import __version__

if TYPE_CHECKING:
    from erniekit.api import load_model, save_model

__all__ = ["__version__", "load_model", "save_model", "train"]

runtime.prepare()  # before anyone imports paddle: it reads these settings once
# Paddle says this on import to whoever has no ccache; nothing is compiled here.
warnings.filterwarnings("ignore", message="No ccache found", category=UserWarning)


class _CallablePackage(types.ModuleType):
    """`erniekit.train` is a package, and by its public name also a function: whichever is imported first, both work."""

    def __call__(self, yaml_path: str, **overrides: Any) -> Any:
        """See `erniekit.api.train`."""
        from erniekit import api

        return api.train(yaml_path, **overrides)


_train_package.__class__ = _CallablePackage


def __getattr__(name: str) -> Any:
    if name in ("load_model", "save_model"):
        from erniekit import api

        return vars(api)[name]
    raise AttributeError(f"module 'erniekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
