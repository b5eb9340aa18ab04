"""What every test runs under: no network, no display, the same examples each time."""

import os
import tempfile

from erniekit.utils import runtime

runtime.prepare()  # before any test imports paddle
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# What runs keep for later ones must not come from an earlier test run, nor go to the user's own cache.
_CACHE = tempfile.TemporaryDirectory(prefix="erniekit-tests-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
for name in ("NNODES", "PADDLE_TRAINERS_NUM", "ALLOW_EXTRA_ARGS"):
    os.environ.pop(name, None)

try:
    from hypothesis import settings
except ImportError:  # the tests that need it say so themselves
    pass
else:
    settings.register_profile("erniekit", deadline=None, derandomize=True, database=None)
    settings.load_profile("erniekit")
