"""The one part of the packaging that cannot be static: which Paddle a plain `pip install .` brings.

paddlepaddle (CPU) and paddlepaddle-gpu are two distributions that install the same files, so a fixed requirement on
one would overwrite the other. A plain install must train, hence the CPU wheel is required by default; it is left out
where another build of Paddle is already installed, or where ERNIEKIT_PADDLE says so: `gpu` requires the GPU wheel,
`none` requires no Paddle (for installers, such as uv, whose build does not see the environment it builds for).
"""

import os
import sysconfig
from importlib import metadata

from setuptools import setup

PADDLE = {"cpu": ["paddlepaddle>=3.3,<3.4"], "gpu": ["paddlepaddle-gpu>=3.3,<3.4"], "none": []}

RUN_TIME = [
    "numpy>=1.26,<3",
    "pyyaml>=6.0.1,<7",
    "sentencepiece>=0.2,<0.3",
    "tokenizers>=0.21,<1",
    "jinja2>=3.1,<4",
    "rich>=13,<16",
    "huggingface_hub>=0.25,<3",
    "matplotlib>=3.8,<4",
    "pillow>=10.1,<14",
]


def other_paddle_installed() -> bool:
    """True if the environment we install into has a Paddle for another device.

    Its directories are searched by path because pip's build isolation hides them from this process's sys.path.
    """
    site = list({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    names = {(found.metadata["Name"] or "").lower().replace("_", "-") for found in metadata.distributions(path=site)}
    return any(name.startswith("paddlepaddle-") for name in names)


def paddle_requirement() -> list[str]:
    """The requirement for Paddle, see the top of this file."""
    choice = os.environ.get("ERNIEKIT_PADDLE") or ("none" if other_paddle_installed() else "cpu")
    if choice not in PADDLE:
        raise SystemExit(f"ERNIEKIT_PADDLE={choice!r}: expected one of {', '.join(PADDLE)}")
    return PADDLE[choice]


setup(install_requires=paddle_requirement() + RUN_TIME)
