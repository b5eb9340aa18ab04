"""Decoding in worker processes: ending while pictures are being decoded."""

import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest

from erniekit.data.vision.decode import MediaDecoder
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.plan import plan_media
from erniekit.data.vision.processor_files import ProcessorSettings
from erniekit.data.vision.video import DEFAULT_OPTIONS
from erniekit.utils.errors import DataError


@pytest.mark.parametrize("workers", [1, 2])
def test_stopping_ends_the_threads_although_pictures_wait(tmp_path, workers):
    """A thread that waits for a worker forever would keep the process from ending."""
    parts = [{"type": "image", "image": np.zeros((1500, 1500, 3), np.uint8)}] * 200
    plans = plan_media(parts, MediaReader(tmp_path), ProcessorSettings(), DEFAULT_OPTIONS)
    decoder = MediaDecoder(workers)
    results = iter(decoder.results(plans))
    next(results)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("erniekit-decode")]
    assert len(threads) == workers
    decoder.stop()
    end = time.monotonic() + 20
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    assert not [thread for thread in threads if thread.is_alive()]
    with pytest.raises((DataError, CancelledError)):
        list(results)
