"""SIGTERM is noted, not obeyed; and not taken from whoever catches it already."""

import subprocess
import sys

import pytest

SEND = "import os, signal; from erniekit.utils import stop; "


@pytest.mark.parametrize("paddle", ["", "import paddle; stop.listen(); "])
def test_sigterm_is_noted(paddle):
    code = f"{SEND} stop.listen(); {paddle} os.kill(os.getpid(), signal.SIGTERM); print(stop.asked())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_another_handler_keeps_it():
    code = (
        f"{SEND} signal.signal(signal.SIGTERM, lambda *_: print('theirs')); stop.listen();"
        "os.kill(os.getpid(), signal.SIGTERM); print(stop.asked())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "theirs\nFalse\n"), done.stderr
