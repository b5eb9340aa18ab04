"""Muon: momentum, made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), for the matrices of
the layers; AdamW for all other parameters.

For a matrix W [in, out] with gradient G, momentum mu, rate r and decay d:

  M <- mu M + (1 - mu) G          U = mu M + (1 - mu) G                              (Nesterov)
  O = NewtonSchulz(U)             W <- (1 - r d) W - r s O

O is near the orthogonal matrix that is nearest to U: of U's singular value decomposition P S Q^T it is P S' Q^T, where
every singular value of S' is between 0.68 and 1.14, unless it was next to zero. With s = 0.2 sqrt(max(in, out)) the
root mean square of an update is that of AdamW, and the two share one learning rate (Liu et al. 2025, arXiv 2502.16982,
section 2.2).

What is one matrix: a head of q, k or v, each of them, or all of q|k|v (muon_qkv_update_mode); gate|up, or each of the
two (muon_ffn_split); every expert by itself; every other projection as a whole, however many ranks it is divided over.
Where ranks have shares of a matrix or of its momentum, U is gathered, and each of them computes O of the whole and
takes its own share, so that N ranks compute what one does.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import paddle

from erniekit.config import Config
from erniekit.models.decoder import CausalLM
from erniekit.nn.linear import Projection
from erniekit.nn.roles import matrix_names
from erniekit.nn.shard import ShardSpec, joined, share_of
from erniekit.parallel import comm
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.process_group import ALONE, Group
from erniekit.parallel.zero import ShardedParameters
from erniekit.training.adamw import AdamW, ParamRule
from erniekit.training.moments import MomentDtype
from erniekit.training.state_storage import StateStorage

MOMENTUM = "momentum"
# Of x, x^3 and x^5: chosen so that five steps bring singular values from 0.01 to 1 into 0.68 .. 1.14 (Jordan et al.).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPSILON = 1e-7


@dataclass(frozen=True)
class MuonOptions:
    """The keys muon_*; see config/schema_train.py."""

    momentum: float = 0.95
    ns_steps: int = 5
    version: int = 3
    extra_scale_factor: float = 0.2

    @classmethod
    def from_config(cls, cfg: Config) -> "MuonOptions":
        """The options of a configuration."""
        return cls(cfg.muon_momentum, cfg.muon_ns_steps, cfg.muon_version, cfg.muon_extra_scale_factor)

    def scale(self, num_in: int, num_out: int) -> float:
        """What the orthogonal update of a matrix [in, out] is multiplied by."""
        if self.version == 1:
            scale = max(1.0, num_out / num_in)
        else:
            scale = num_out / num_in if self.version == 2 else float(max(num_in, num_out))
        return self.extra_scale_factor * math.sqrt(scale)


@dataclass(frozen=True)
class MatrixLayout:
    """The matrices of a parameter [.., in, out]: the numbers of their columns, side by side in the whole parameter.
    `spec`: how tensor ranks divide it, and `group` these ranks; ALONE: it is whole, or divided by experts.
    """

    widths: tuple[int, ...]
    spec: ShardSpec | None = None
    group: Group = ALONE


def matrix_layouts(model: CausalLM, cfg: Config, mesh: Mesh) -> dict[str, MatrixLayout]:
    """The matrices of every parameter in `nn.roles.matrix_names`; none where `optim` is not muon."""
    if cfg.optim != "muon":
        return {}
    projections = {f"{name}.weight": layer for name, layer in model.named_sublayers() if isinstance(layer, Projection)}
    layouts = {}
    for name in matrix_names(model):
        projection = projections[name]
        spec, share = projection.shard_specs().get("weight"), 1
        if spec is not None and (spec.over != "tensor" or mesh.tensor_group.size == 1):
            spec = None
        if spec is not None and spec.axis == 1:
            share = mesh.tensor_group.size
        widths = _widths(projection, share, cfg.muon_qkv_update_mode, cfg.muon_ffn_split)
        layouts[name] = MatrixLayout(widths, spec, ALONE if spec is None else mesh.tensor_group)
    return layouts


def _widths(projection: Projection, share: int, qkv_mode: str, splits_gate_up: bool) -> tuple[int, ...]:
    """The columns of each matrix; this process has one of `share` shares of them."""
    total, parts = projection.out_features * share, tuple(width * share for width in projection.parts.values())
    if projection.head_dim is not None:
        if qkv_mode == "split_head":
            return (projection.head_dim,) * (total // projection.head_dim)
        return (parts or (total // 3,) * 3) if qkv_mode == "split_qkv" else (total,)
    return parts if parts and splits_gate_up else (total,)


def orthogonalised(x: paddle.Tensor, num_steps: int) -> paddle.Tensor:
    """Newton-Schulz iteration of matrices [.., m, n] fp32 -> the same shape. A matrix of zeros stays so."""
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.transpose([*range(x.ndim - 2), x.ndim - 1, x.ndim - 2])
    x = x / (x.square().sum(axis=[-2, -1], keepdim=True).sqrt() + _EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(num_steps):
        gram = paddle.matmul(x, x, transpose_y=True)
        x = a * x + paddle.matmul(b * gram + c * paddle.matmul(gram, gram), x)
    return x if wide else x.transpose([*range(x.ndim - 2), x.ndim - 1, x.ndim - 2])


class Muon(AdamW):
    """See the module, and AdamW: of a parameter in `matrices` the state is "momentum" and the master copy.

    Args:
        matrices: the parameters that Muon updates, and how they are divided into matrices.
        options: of Muon; the others are AdamW's.
    """

    def __init__(
        self,
        parameters: ShardedParameters,
        rules: dict[str, ParamRule],
        beta1: float,
        beta2: float,
        epsilon: float,
        moment_dtype: MomentDtype = "fp32",
        storage: StateStorage | None = None,
        *,
        matrices: Mapping[str, MatrixLayout],
        options: MuonOptions,
    ) -> None:
        self._matrices, self._options = matrices, options
        assert all(entry.num_moments == len(self._moments(name)) for name, entry in parameters.entries.items())
        super().__init__(parameters, rules, beta1, beta2, epsilon, moment_dtype, storage)

    def _moments(self, name: str) -> tuple[str, ...]:
        return (MOMENTUM,) if name in self._matrices else super()._moments(name)

    def _power_names(self, name: str) -> tuple[str, ...]:
        return () if name in self._matrices else super()._power_names(name)

    def _update(
        self,
        name: str,
        parameter: paddle.Tensor,
        gradient: paddle.Tensor,
        rate: paddle.Tensor,
        moments: Sequence[paddle.Tensor],
        master: paddle.Tensor | None,
    ) -> None:
        if name not in self._matrices:
            super()._update(name, parameter, gradient, rate, moments, master)
            return
        (momentum,), share = moments, self._options.momentum
        new = (1.0 - share) * gradient.astype("float32")
        paddle.assign(share * momentum + new, momentum)
        direction = self._direction(name, share * momentum + new)
        weight = parameter if master is None else master
        paddle.assign(weight * (1.0 - rate * self.rules[name].weight_decay) - rate * direction, weight)
        if master is not None:
            paddle.assign(master.astype(parameter.dtype), parameter)

    def _direction(self, name: str, update: paddle.Tensor) -> paddle.Tensor:
        """The orthogonal update, scaled, of what this rank has of a parameter: the parameter's shape, or a chunk."""
        layout = self._matrices[name]
        group, spec = layout.group, layout.spec
        update = self.parameters.whole(name, update)
        if spec is not None:
            update = joined(comm.all_gather(update, group).split(group.size, axis=0), spec)
        pieces: defaultdict[int, list[int]] = defaultdict(list)
        for number, width in enumerate(layout.widths):
            pieces[width].append(number)
        parts, found = update.split(list(layout.widths), axis=-1), [update] * len(layout.widths)
        for width, numbers in pieces.items():
            scale = self._options.scale(update.shape[-2], width)
            made = orthogonalised(paddle.stack([parts[n] for n in numbers]), self._options.ns_steps) * scale
            for n, matrix in zip(numbers, made, strict=True):
                found[n] = matrix
        direction = paddle.concat(found, axis=-1)
        if spec is not None:
            direction = share_of(direction, spec, group.index, group.size)
        return self.parameters.chunk_of(name, direction)
