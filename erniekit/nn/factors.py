"""The factors of matrix products on a CPU, rounded to bf16 where a run asks for it (`matmul_precision: bf16`).

All tensors stay fp32. A product rounds its two factors to the nearest bf16 value, ties to even (numbers of less than
2^-126 to zero, as the processor's instruction does), and sums in fp32: what torch calls a float32 matmul precision of
"medium". Such are the products of projections, experts, adapters and the head, forward and backward. Routers, the
products inside attention and passes of generation keep fp32 factors.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import paddle

from erniekit.nn import decoding, onednn
from erniekit.nn.onednn import RESULT, SOURCE, Primitive, dense
from erniekit.utils import runtime


class _State(threading.local):
    are_rounded = False


_state = _State()


@contextmanager
def rounded() -> Iterator[None]:
    """The products of this thread inside round their factors. The backward pass belongs inside, too. The processor and
    the wheel must be able to (`onednn.multiplies_bf16`).
    """
    before, _state.are_rounded = _state.are_rounded, True
    try:
        yield
    finally:
        _state.are_rounded = before


def are_rounded() -> bool:
    """Whether products round their factors here and now."""
    return _state.are_rounded and not decoding.is_running()


def factor(x: paddle.Tensor) -> paddle.Tensor:
    """The numbers by which a product multiplies instead of those of x, which is fp32 and contiguous on a CPU, and not
    empty: bf16 of its shape where factors are rounded; otherwise, and if it is rounded already, x itself.
    """
    if not are_rounded() or x.dtype != paddle.float32:
        return x
    out = paddle._C_ops.empty(x.shape, paddle.bfloat16, x.place)
    _rounding(threading.get_ident(), runtime.threads_in_use(), math.prod(x.shape)).run(x.data_ptr(), out.data_ptr())
    return out


@lru_cache(maxsize=512)
def _rounding(thread: int, num_threads: int, size: int) -> Primitive:
    """Rounding of `size` numbers, divided over the threads that there are when it is made."""
    wide, narrow = dense(size), dense(size)._replace(data_type=onednn.BFLOAT16)
    return Primitive("reorder", (wide, narrow), ((SOURCE, wide), (RESULT, narrow)))
