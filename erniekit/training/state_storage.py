"""Where the optimizer's state is between steps: on the device, or in host memory (offload_optim).

From host memory the state of one parameter at a time is copied to the device and, when it has been updated, back. On a
GPU the copies run beside the computation, on pinned memory, and the next parameter's state is under way while one is
updated; the device needs room for the state of two parameters (tensorwise_offload_optimizer: of one).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import paddle

from erniekit.utils import log

Fields = dict[str, paddle.Tensor]


class StateStorage(Protocol):
    """The state of each parameter, by its name."""

    def put(self, name: str, fields: Fields) -> None:
        """Store the state of a parameter; the storage owns the tensors from then on."""
        ...

    def get(self, name: str) -> Fields:
        """The state of a parameter on the device. Changes count when it is put back."""
        ...

    def iterate(self, names: Iterable[str]) -> Iterator[tuple[str, Fields]]:
        """The state of each parameter in turn, on the device; what the caller made of it is stored when the next one is
        asked for.
        """
        ...


class OnDevice:
    """State that stays on the device."""

    def __init__(self) -> None:
        self._fields: dict[str, Fields] = {}

    def put(self, name: str, fields: Fields) -> None:
        self._fields[name] = fields

    def get(self, name: str) -> Fields:
        return self._fields[name]

    def iterate(self, names: Iterable[str]) -> Iterator[tuple[str, Fields]]:
        for name in names:
            yield name, self._fields[name]


class Copies(Protocol):
    """Copies between device and host memory. Each method returns the copy and what to call before it is used."""

    def to_host(self, tensor: paddle.Tensor) -> tuple[paddle.Tensor, Any]: ...

    def to_device(self, tensor: paddle.Tensor) -> tuple[paddle.Tensor, Any]: ...


class GpuCopies:
    """Copies on a stream of their own, between the GPU and pinned memory."""

    def __init__(self) -> None:
        self._load = paddle.incubate.tensor.manipulation.create_async_load()

    def to_host(self, tensor: paddle.Tensor) -> tuple[paddle.Tensor, Any]:
        copy, task = paddle.incubate.tensor.manipulation.async_offload(tensor, self._load)
        return copy, task.cpu_wait

    def to_device(self, tensor: paddle.Tensor) -> tuple[paddle.Tensor, Any]:
        copy, task = paddle.incubate.tensor.manipulation.async_reload(tensor, self._load)
        return copy, task.cuda_wait


class CpuCopies:
    """Where the device is the CPU: plain copies, so that a run takes the same path."""

    def to_host(self, tensor: paddle.Tensor) -> tuple[paddle.Tensor, Any]:
        return tensor.clone(), lambda: None

    to_device = to_host


class OnHost:
    """State in host memory. `ahead`: how many parameters' states are fetched before they are needed."""

    def __init__(self, copies: Copies, ahead: int = 1) -> None:
        self._copies, self._ahead = copies, ahead
        self._fields: dict[str, Fields] = {}

    def put(self, name: str, fields: Fields) -> None:
        self._settle(self._leave(name, fields))

    def get(self, name: str) -> Fields:
        return self._arrive(self._fetch(name))

    @paddle.no_grad()
    def iterate(self, names: Iterable[str]) -> Iterator[tuple[str, Fields]]:
        queue = list(names)
        coming = [self._fetch(name) for name in queue[: self._ahead]]
        leaving: list[tuple[Fields, list[Any]]] = []
        for number, name in enumerate(queue):
            following = number + self._ahead
            if following < len(queue):
                coming.append(self._fetch(queue[following]))
            fields = self._arrive(coming.pop(0))
            yield name, fields
            leaving.append(self._leave(name, fields))
            while len(leaving) > self._ahead:
                self._settle(leaving.pop(0))
        for each in leaving:
            self._settle(each)

    def _fetch(self, name: str) -> tuple[Fields, list[Any]]:
        return _all(self._copies.to_device, self._fields[name])

    def _arrive(self, coming: tuple[Fields, list[Any]]) -> Fields:
        fields, waits = coming
        for wait in waits:
            wait()
        return fields

    def _leave(self, name: str, fields: Fields) -> tuple[Fields, list[Any]]:
        """Start to copy to the host. What is returned keeps the source until `_settle`."""
        self._fields[name], waits = _all(self._copies.to_host, fields)
        return fields, waits

    def _settle(self, leaving: tuple[Fields, list[Any]]) -> None:
        for wait in leaving[1]:
            wait()


def _all(copy: Any, fields: Mapping[str, paddle.Tensor]) -> tuple[Fields, list[Any]]:
    made = {field: copy(tensor) for field, tensor in fields.items()}
    return {field: tensor for field, (tensor, _) in made.items()}, [wait for _, wait in made.values()]


def build_storage(offloads: bool, one_at_a_time: bool, emulate: bool = False) -> StateStorage:
    """The storage that offload_optim and tensorwise_offload_optimizer ask for. On a CPU, all memory is the host's; only
    where a GPU is to be emulated are the copies made.
    """
    if not offloads and not one_at_a_time:
        return OnDevice()
    if paddle.get_device().startswith("gpu"):
        return OnHost(GpuCopies(), ahead=0 if one_at_a_time else 1)
    if emulate:
        return OnHost(CpuCopies(), ahead=0 if one_at_a_time else 1)
    key = "tensorwise_offload_optimizer" if one_at_a_time else "offload_optim"
    log.info(f"{key}: no effect on a CPU, whose memory holds the optimizer's state anyway")
    return OnDevice()
