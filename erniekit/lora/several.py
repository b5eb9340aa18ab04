"""Several adapters on one base at a time: each row of a batch uses the adapter of its own, or none.

`put_together` puts a `SeveralAdapters` into the slot of every projection that any of them adapts; `AdapterSet.using`
says which adapter each row of the passes inside it has. For use without gradients, in one process.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import paddle
from paddle import nn

from erniekit.lora.layers import Adapter
from erniekit.nn.linear import Projection

_STATE = "adapter_set"  # the name of a plain attribute of the model


class _Part(NamedTuple):
    """The rows that have an adapter; `rows` int64 [N] are their numbers, None: all of them."""

    adapter: str
    rows: paddle.Tensor | None


class AdapterSet:
    """The adapters of a model by name, and which of them the rows of the present pass have."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._rows: tuple[str | None, ...] = ()
        self._sources: np.ndarray | None = None  # of the rows of experts: the token of each
        self._parts: dict[int, list[_Part]] = {}

    @contextmanager
    def using(self, rows: Sequence[str | None]) -> Iterator[None]:
        """Passes inside it have these rows, all of one width; None: a row without an adapter."""
        assert set(rows) <= {None, *self.names}, (rows, self.names)
        before, self._rows, self._parts = self._rows, tuple(rows), {}
        try:
            yield
        finally:
            self._rows, self._parts = before, {}

    def note_routing(self, chosen_TK: np.ndarray, tokens: np.ndarray | None, num_tokens: int) -> None:
        """Remember which token each row of a layer's experts is of. chosen [T, K]: the experts of T tokens, which are
        all `num_tokens` of the pass, or those numbered `tokens`.
        """
        order = np.argsort(chosen_TK.reshape(-1), kind="stable") // chosen_TK.shape[1]
        self._sources = order if tokens is None else tokens[order]
        self._num_tokens = num_tokens

    def of_tokens(self, num_tokens: int) -> list[_Part]:
        """The tokens of each adapter that the pass uses."""
        if num_tokens not in self._parts:
            self._parts[num_tokens] = self._divided(self._names_of(np.arange(num_tokens), num_tokens))
        return self._parts[num_tokens]

    def of_expert_rows(self) -> list[_Part]:
        """The parts for the rows of a layer's experts, whose routing was noted last."""
        if set(self._rows) <= {None}:
            return []
        assert self._sources is not None, "a sparse layer notes its routing"
        return self._divided(self._names_of(self._sources, self._num_tokens))

    def _names_of(self, tokens: np.ndarray, num_tokens: int) -> np.ndarray:
        """The number of the adapter of each of these tokens, -1 for none."""
        if not self._rows:
            return np.full(len(tokens), -1)
        assert num_tokens % len(self._rows) == 0, (num_tokens, len(self._rows))
        numbers = np.array([-1 if name is None else self.names.index(name) for name in self._rows])
        return numbers[tokens // (num_tokens // len(self._rows))]

    def _divided(self, numbers: np.ndarray) -> list[_Part]:
        parts = []
        for number in np.unique(numbers[numbers >= 0]).tolist():
            index = np.flatnonzero(numbers == number)
            parts.append(_Part(self.names[number], None if len(index) == len(numbers) else paddle.to_tensor(index)))
        return parts


class SeveralAdapters(nn.Layer):
    """Occupies the adapter slot of a projection with the adapters of different rows, by name."""

    def __init__(self, adapters: Mapping[str, Adapter], chosen: AdapterSet) -> None:
        super().__init__()
        self._chosen = chosen
        self._by_name: dict[str, Adapter] = {}
        self._num_added = 0
        for name, adapter in adapters.items():
            self.add(name, adapter)

    def add(self, name: str, adapter: Adapter) -> None:
        """Add the adapter of a further name."""
        self._by_name[name] = adapter
        self.add_sublayer(f"adapter_{self._num_added}", adapter)
        self._num_added += 1

    def remove(self, name: str) -> None:
        """Remove the adapter of a name, if there is one."""
        gone = self._by_name.pop(name, None)
        for key in [key for key, layer in self._sub_layers.items() if layer is gone]:
            del self._sub_layers[key]

    def forward(self, x: paddle.Tensor, *rest: object) -> paddle.Tensor:
        """(x [..., in], product [..., out]) or, of experts, (rows [R, in] sorted by expert, counts, products [R, out])
        -> the adapted product.
        """
        if len(rest) == 2:
            counts, y = rest
            return self._adapt_experts(x, counts, y)  # type: ignore[arg-type]
        (y,) = rest
        return self._adapt(x, y)

    def _adapt(self, x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
        shape = y.shape
        x, y = x.reshape([-1, x.shape[-1]]), y.reshape([-1, shape[-1]])
        for name, part in self._chosen.of_tokens(y.shape[0]):
            adapter = self._by_name.get(name)
            if adapter is not None:
                y = _changed(y, part, adapter, x)
        return y.reshape(shape)

    def _adapt_experts(self, rows: paddle.Tensor, counts: list[int], y: paddle.Tensor) -> paddle.Tensor:
        experts = np.repeat(np.arange(len(counts)), counts)
        for name, part in self._chosen.of_expert_rows():
            adapter = self._by_name.get(name)
            if adapter is None:
                continue
            own = counts if part is None else np.bincount(experts[part.numpy()], minlength=len(counts)).tolist()
            y = _changed(y, part, partial(_adapt_sorted, adapter, own), rows)
        return y


def _adapt_sorted(adapter: Adapter, counts: list[int], x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    return adapter(x, counts, y)


def _changed(
    y: paddle.Tensor,
    part: paddle.Tensor | None,
    adapt: Callable[[paddle.Tensor, paddle.Tensor], paddle.Tensor],
    x: paddle.Tensor,
) -> paddle.Tensor:
    """y with the rows of `part` adapted."""
    if part is None:
        return adapt(x, y)
    return paddle.scatter(y, part, adapt(paddle.gather(x, part), paddle.gather(y, part)), overwrite=True)


def adapter_set_of(model: nn.Layer) -> AdapterSet | None:
    """The adapters that rows of `model` may have; None: it has none of this kind."""
    return vars(model).get(_STATE)


@contextmanager
def rows_of(model: nn.Layer, names: Sequence[str | None]) -> Iterator[None]:
    """Passes of `model` inside it have rows with these adapters."""
    adapters = adapter_set_of(model)
    if adapters is None:
        assert set(names) <= {None}, names
        yield
        return
    with adapters.using(names):
        yield


def empty_slots(model: nn.Layer) -> dict[str, SeveralAdapters]:
    """Empty the slots of `model` -> projection -> what was there; `fill_slots` puts it back."""
    taken = {}
    for name, layer in model.named_sublayers():
        if isinstance(layer, Projection) and isinstance(layer.adapter, SeveralAdapters):
            taken[name] = layer.adapter
    for name, layer in list(model.named_sublayers()):
        if name in taken:
            layer.adapter = None
    return taken


def fill_slots(model: nn.Layer, taken: Mapping[str, SeveralAdapters]) -> None:
    """Put what `empty_slots` gave into the slots again."""
    for name, layer in list(model.named_sublayers()):
        if name in taken:
            layer.adapter = taken[name]


def add_adapter(model: nn.Layer, name: str, adapters: Mapping[str, Adapter]) -> None:
    """Add an adapter (projection -> adapter) to those that rows of `model` may have, while no pass runs."""
    chosen = adapter_set_of(model)
    assert chosen is not None and name not in chosen.names, name
    for projection, layer in list(model.named_sublayers()):
        if projection in adapters:
            if layer.adapter is None:
                layer.adapter = SeveralAdapters({}, chosen)
            layer.adapter.add(name, adapters[projection])
    chosen.names = (*chosen.names, name)


def remove_adapter(model: nn.Layer, name: str) -> None:
    """Remove an adapter that no row has, while no pass runs."""
    chosen = adapter_set_of(model)
    assert chosen is not None and name in chosen.names, name
    for _, layer in list(model.named_sublayers()):
        if isinstance(layer, Projection) and isinstance(layer.adapter, SeveralAdapters):
            layer.adapter.remove(name)
    chosen.names = tuple(other for other in chosen.names if other != name)


def put_together(model: nn.Layer, taken: Mapping[str, Mapping[str, Adapter]]) -> AdapterSet:
    """Put adapters (name -> projection -> adapter) into the slots of `model`, which are empty."""
    chosen = AdapterSet(list(taken))
    for name, layer in list(model.named_sublayers()):
        if isinstance(layer, Projection):
            here = {adapter: layers[name] for adapter, layers in taken.items() if name in layers}
            if here:
                layer.adapter = SeveralAdapters(here, chosen)
    vars(model)[_STATE] = chosen
    return chosen
