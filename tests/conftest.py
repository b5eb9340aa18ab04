"""What every test runs under: no network, no display, the same examples each time."""

import os

import erniekit  # noqa: F401  sets the CPU environment before any test imports paddle

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["ERNIEKIT_JOB_TOKEN"] = "a token of tests, long enough"  # else one is kept in the user's cache directory
for name in ("NNODES", "PADDLE_TRAINERS_NUM", "ALLOW_EXTRA_ARGS"):
    os.environ.pop(name, None)

try:
    from hypothesis import settings
except ImportError:  # the tests that need it say so themselves
    pass
else:
    settings.register_profile("erniekit", deadline=None, derandomize=True, database=None)
    settings.load_profile("erniekit")
