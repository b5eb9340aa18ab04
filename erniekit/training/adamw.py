"""AdamW, whose state is stored under the names of the parameters."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import paddle

from erniekit.config.schema import Config
from erniekit.models.decoder import CausalLM
from erniekit.nn.roles import Component, Role, named_components, named_roles
from erniekit.parallel.zero import ShardedParameters
from erniekit.training.moment_codes import MOMENTS
from erniekit.training.moments import MomentDtype, store_of
from erniekit.training.state_storage import OnDevice, StateStorage

# Fields of the state that are a single number for each parameter.
POWERS = ("beta1_pow", "beta2_pow")


@dataclass(frozen=True)
class ParamRule:
    """How one parameter is updated: its multiple of the learning rate and its decoupled weight decay."""

    lr_ratio: float
    weight_decay: float


NOT_DECAYED = frozenset({Role.NORM, Role.BIAS, Role.SCALE, Role.QUANTIZER})


def parameter_rules(model: CausalLM, cfg: Config) -> dict[str, ParamRule]:
    """The rule of each parameter by name. Norms, biases, scales and quantisers are not decayed. With
    layerwise_lr_decay_bound b < 1 the rate of a model of n layers is b + (1 - b) * depth / (n + 2); routers have
    moe_gate_lr_ratio (all of them; ERNIEKit's code applies it to none), an adapter's B lora_plus_scale (LoRA+: Hayou et
    al. 2024, arXiv 2402.12354), and the parts of a vision-language model what `_vision_ratios` gives.
    """
    roles, depths = named_roles(model), model.parameter_depths()
    bound, num_depths = cfg.layerwise_lr_decay_bound, model.config.num_hidden_layers + 2
    ratios = {Role.ADAPTER_B: cfg.lora_plus_scale}
    if cfg.moe_gate_lr_ratio is not None:
        ratios[Role.ROUTER] = cfg.moe_gate_lr_ratio
    vision = _vision_ratios(model, cfg)
    return {
        name: ParamRule(
            (bound + (1.0 - bound) * depth / num_depths) * ratios.get(roles[name], 1.0) * vision.get(name, 1.0),
            0.0 if roles[name] in NOT_DECAYED else cfg.weight_decay,
        )
        for name, depth in depths.items()
    }


def _vision_ratios(model: CausalLM, cfg: Config) -> dict[str, float]:
    """vit_lr_ratio r: block i of the vision transformer's n has r^(n-1-i), the patch embedding as block 0, and the
    final norm 1. resampler_lr_ratio: of all of the resampler. By name of the parameter; others have 1.
    """
    ratios: dict[str, float] = {}
    transformer = model.model.vision_model
    decay = cfg.visual_ld if cfg.vit_lr_ratio is None else cfg.vit_lr_ratio
    if transformer is not None and decay is not None:
        last = transformer.config.depth - 1
        depths = transformer.parameter_depths()
        ratios |= {f"model.vision_model.{name}": decay ** max(last - depth, 0) for name, depth in depths.items()}
    if cfg.resampler_lr_ratio is not None:
        components = named_components(model)
        resampler = [name for name, component in components.items() if component is Component.RESAMPLER]
        ratios |= dict.fromkeys(resampler, cfg.resampler_lr_ratio)
    return ratios


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2), one fused kernel a
    parameter.

    State is two moments, the powers of the betas, and, for 16-bit parameters, an fp32 master copy. The moments are
    computed in fp32 and stored as training/moments.py says; all but the powers is where training/state_storage.py says.
    `state` maps parameter name -> {"moment1", "moment2", "beta1_pow", "beta2_pow"[, "master"]} -> tensor, under the
    names of `model.named_parameters()`. Where a parameter's state is divided over ranks, moments and master copy are
    this rank's chunk [c], flat (parallel/buckets.py).

    Args:
        parameters: the trainable parameters.
        rules: the rule of each parameter.
        moment_dtype: how the moments are stored.
        storage: where the state is between steps; None: on the device.
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
    ) -> None:
        self.parameters = parameters
        self.rules = rules
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self._rounds_at_random = moment_dtype != "fp32"
        self._stores = {name: store_of(moment_dtype, entry.chunk) for name, entry in parameters.entries.items()}
        self._storage = OnDevice() if storage is None else storage
        self._powers: dict[str, dict[str, paddle.Tensor]] = {}
        self.reset()

    @paddle.no_grad()
    def reset(self) -> None:
        """Reset the state. Master copies get the present values of the parameters."""
        for name in self.parameters.tensors:
            own, fields = self.parameters.local_chunk(name), dict[str, paddle.Tensor]()
            for moment in self._moments(name):
                zeros = paddle.zeros(own.shape, dtype="float32")
                self._stores[name].write(fields, moment, zeros, at_random=False)
            if own.dtype != paddle.float32:
                fields["master"] = own.astype("float32")
            self._storage.put(name, fields)
            betas = zip(POWERS, (self.beta1, self.beta2), strict=True)
            powers = {power: paddle.full([1], beta, dtype="float32") for power, beta in betas}
            self._powers[name] = {power: powers[power] for power in self._power_names(name)}

    def _moments(self, name: str) -> tuple[str, ...]:
        """The moments of a parameter."""
        return MOMENTS

    def _power_names(self, name: str) -> tuple[str, ...]:
        """The fields of a parameter's state that are a single number."""
        return POWERS

    @property
    def state(self) -> dict[str, dict[str, paddle.Tensor]]:
        """See the class; copies where the state is in host memory."""
        return {name: self._storage.get(name) | powers for name, powers in self._powers.items()}

    @property
    def has_masters(self) -> bool:
        """Whether any parameter has a master copy."""
        return any(self._has_master(name) for name in self.parameters.entries)

    def _has_master(self, name: str) -> bool:
        return self.parameters.entries[name].dtype != "float32"

    @paddle.no_grad()
    def master(self, name: str) -> paddle.Tensor | None:
        """A parameter's whole master copy, fp32; None if it has none. If the state is divided, all ranks of the
        parameter's shard group must call this together.
        """
        own = self.local_master(name)
        return None if own is None else self.parameters.whole(name, own)

    def local_master(self, name: str) -> paddle.Tensor | None:
        """What this rank has of a parameter's master copy, fp32; None if it has none."""
        if name not in self.parameters.entries or not self._has_master(name):
            return None
        return self._storage.get(name)["master"]

    def state_bytes(self) -> int:
        """The bytes of the state on this rank, counted over its tensors; the formula is parallel.memory.state_bytes."""
        return sum(t.numel().item() * t.element_size() for fields in self.state.values() for t in fields.values())

    @paddle.no_grad()
    def step(self, gradients: Mapping[str, paddle.Tensor], learning_rate: float, seed: int = 0) -> None:
        """Update every parameter that has a gradient (see `GradientSync.finish`). A parameter without one on any rank
        (an expert no token reached has a zero gradient, not none) is left alone. `seed`: of the moments' rounding,
        another one for each step and the same on all ranks.
        """
        updated = {}
        # One tensor for each distinct rate, filled on the device, so that nothing is uploaded.
        ratios = {self.rules[name].lr_ratio for name in self.parameters.tensors}
        rates = {ratio: paddle.full([1], learning_rate * ratio, dtype="float32") for ratio in ratios}
        for name, fields in self._storage.iterate(gradients):
            parameter, store = self.parameters.local_chunk(name), self._stores[name]
            moments = [store.read(fields, moment) for moment in self._moments(name)]
            master = fields.get("master")
            rate = rates[self.rules[name].lr_ratio]
            if master is not None and parameter.place.is_cpu_place():
                # Paddle's CPU kernel has no 16-bit parameters. It updates the master, and the parameter is rounded.
                self._update(name, master, gradients[name].astype("float32"), rate, moments, None)
                paddle.assign(master.astype(parameter.dtype), parameter)
            else:
                # With a master copy the kernel accepts an fp32 gradient; rounding it would undo its fp32 sum.
                gradient = gradients[name] if master is not None else gradients[name].astype(parameter.dtype)
                self._update(name, parameter, gradient, rate, moments, master)
            if self._rounds_at_random:  # the same on every rank that has a copy
                paddle.seed(zlib.crc32(f"{seed} {name}".encode()))
            for moment, values in zip(self._moments(name), moments, strict=True):
                store.write(fields, moment, values, at_random=self._rounds_at_random)
            parameter._bump_inplace_version()  # the kernel does not do this, and products rely on it (nn/product.py)
            updated[name] = parameter
        self.parameters.publish(updated)

    def _update(
        self,
        name: str,
        parameter: paddle.Tensor,
        gradient: paddle.Tensor,
        rate: paddle.Tensor,
        moments: Sequence[paddle.Tensor],
        master: paddle.Tensor | None,
    ) -> None:
        """Paddle's fused kernel: parameter, moments, powers and master in place."""
        decay = self.rules[name].weight_decay
        paddle._C_ops.adamw_(
            parameter,
            gradient,
            rate,
            *moments,
            None,  # moment2_max: AMSGrad is off
            *(self._powers[name][power] for power in POWERS),
            master,
            None,  # found_inf: a step whose gradients are not finite does not come here
            self.beta1,
            self.beta2,
            self.epsilon,
            1.0,
            decay,
            decay > 0.0,
            False,  # lazy_mode
            1000,  # min_row_size_to_use_multithread
            master is not None,
            False,  # use_global_beta_pow
            False,  # amsgrad
        )

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every entry of the state, "parameter name/field", and its whole shape: the parameter's, or [1]."""
        return {
            f"{name}/{field}": self._shape(name, field)
            for name in self.parameters.entries
            for field in self._field_names(name)
        }

    def _field_names(self, name: str) -> tuple[str, ...]:
        return (*self._moments(name), *self._power_names(name), *(("master",) if self._has_master(name) else ()))

    def _shape(self, name: str, field: str) -> tuple[int, ...]:
        return (1,) if field in POWERS else self.parameters.entries[name].shape

    @paddle.no_grad()
    def state_array(self, key: str) -> np.ndarray:
        """One entry of the state, whole, fp32. All ranks of the parameter's shard group have to call it together."""
        name, field = key.rsplit("/", 1)
        if field in POWERS:
            return self._powers[name][field].numpy()
        fields = self._storage.get(name)
        chunk = self._stores[name].read(fields, field) if field in self._moments(name) else fields[field]
        return self.parameters.gather(name, chunk)

    @paddle.no_grad()
    def load_state_array(self, key: str, array: np.ndarray) -> None:
        """Set one entry of the state from the whole array. KeyError if the optimizer has no such entry, ValueError if
        its shape differs.
        """
        name, field = key.rsplit("/", 1)
        if name not in self.parameters.entries or field not in self._field_names(name):
            raise KeyError(key)
        if array.shape != self._shape(name, field):
            raise ValueError(f"{key}: shape {array.shape}, not {self._shape(name, field)}")
        if field in POWERS:
            self._powers[name][field].set_value(array)
            return
        chunk, fields = paddle.to_tensor(self.parameters.scatter(name, array)), self._storage.get(name)
        if field in self._moments(name):
            self._stores[name].write(fields, field, chunk, at_random=False)
        else:
            fields[field] = chunk
        self._storage.put(name, fields)
