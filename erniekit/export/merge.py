"""Merges an adapter into its base's weights, tensor by tensor in fp32: W + s A B, rescaled by columns with DoRA."""

import numpy as np

from erniekit.checkpoint.peft_read import StoredAdapter
from erniekit.checkpoint.peft_write import part_sizes
from erniekit.lora.layers import parameter_name
from erniekit.models.config import ModelConfig
from erniekit.models.weights import Logical


class Merge:
    """The changes that an adapter makes to its base's weights."""

    def __init__(self, adapter: StoredAdapter, config: ModelConfig) -> None:
        """`config` is the base's configuration."""
        self.adapter = adapter
        self._columns: dict[str, dict[str, slice]] = {}
        for (module, part), (_, _, width) in part_sizes(config).items():
            columns = self._columns.setdefault(module, {})
            begin = max((previous.stop for previous in columns.values()), default=0)
            columns[part] = slice(begin, begin + width)

    def touches(self, logical: Logical) -> bool:
        """Whether the adapter changes this weight."""
        return logical.param in self.adapter.saved or logical.param.removesuffix(".weight") in self.adapter.slots

    def apply(self, logical: Logical, weight: np.ndarray) -> np.ndarray:
        """The merged weight for a weight of the base, fp32 in our layout. `weight` itself may be modified."""
        if logical.param in self.adapter.saved:
            return self.adapter.tensors[logical.param]
        module, tensors = logical.param.removesuffix(".weight"), self.adapter.tensors
        for part, slot in self.adapter.slots[module].items():
            prefix = f"{module}.adapter."
            a, b = (tensors[prefix + parameter_name(kind, part)] for kind in ("A", "B"))
            if logical.index is not None:
                a, b = a[logical.index], b[logical.index]
            columns = weight[:, self._columns[module][part]]
            columns += a @ (b * np.float32(slot.scaling))
            magnitude = tensors.get(prefix + parameter_name("magnitude", part))
            if magnitude is not None:
                columns *= magnitude / np.linalg.norm(columns, axis=0)
        return weight
