"""AdamW, whose state is stored under the names of the parameters."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import paddle

from erniekit.config.schema import Config
from erniekit.models.decoder import CausalLM
from erniekit.nn.roles import Component, Role, named_components, named_roles
from erniekit.parallel.zero import ShardedParameters

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

    State is fp32: the two moments, the powers of the betas, and, for 16-bit parameters, a master copy. `state` maps
    parameter name -> {"moment1", "moment2", "beta1_pow", "beta2_pow"[, "master"]} -> tensor, under the names of
    `model.named_parameters()`. Where a parameter's state is divided over ranks, moments and master copy are this
    rank's chunk [c], flat (parallel/buckets.py).

    Args:
        parameters: the trainable parameters.
        rules: the rule of each parameter.
    """

    def __init__(
        self,
        parameters: ShardedParameters,
        rules: dict[str, ParamRule],
        beta1: float,
        beta2: float,
        epsilon: float,
    ) -> None:
        self.parameters = parameters
        self.rules = rules
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.reset()

    def reset(self) -> None:
        """Reset the state. Master copies get the present values of the parameters."""
        self.state = {name: self._new_state(name) for name in self.parameters.tensors}

    def _new_state(self, name: str) -> dict[str, paddle.Tensor]:
        own = self.parameters.local_chunk(name)
        state = {
            "moment1": paddle.zeros(own.shape, dtype="float32"),
            "moment2": paddle.zeros(own.shape, dtype="float32"),
            "beta1_pow": paddle.full([1], self.beta1, dtype="float32"),
            "beta2_pow": paddle.full([1], self.beta2, dtype="float32"),
        }
        if own.dtype != paddle.float32:
            state["master"] = own.astype("float32")
        return state

    @property
    def has_masters(self) -> bool:
        """Whether any parameter has a master copy."""
        return any("master" in fields for fields in self.state.values())

    @paddle.no_grad()
    def master(self, name: str) -> paddle.Tensor | None:
        """A parameter's whole master copy, fp32; None if it has none. If the state is divided, all ranks of the
        parameter's shard group must call this together.
        """
        chunk = self.state.get(name, {}).get("master")
        return None if chunk is None else self.parameters.whole(name, chunk)

    def state_bytes(self) -> int:
        """The bytes of the state on this rank, counted over its tensors; the formula is parallel.memory.state_bytes."""
        return sum(t.numel().item() * t.element_size() for fields in self.state.values() for t in fields.values())

    @paddle.no_grad()
    def step(self, gradients: Mapping[str, paddle.Tensor], learning_rate: float) -> None:
        """Update every parameter that has a gradient (see `GradientSync.finish`). A parameter without one on any rank
        (an expert no token reached has a zero gradient, not none) is left alone.
        """
        updated = {}
        # One tensor for each distinct rate, filled on the device, so that nothing is uploaded.
        ratios = {self.rules[name].lr_ratio for name in self.parameters.tensors}
        rates = {ratio: paddle.full([1], learning_rate * ratio, dtype="float32") for ratio in ratios}
        for name, gradient in gradients.items():
            parameter, rule, state = self.parameters.local_chunk(name), self.rules[name], self.state[name]
            updated[name] = parameter
            master = state.get("master")
            if master is not None and parameter.place.is_cpu_place():
                # Paddle's CPU kernel has no 16-bit parameters. It updates the master, and the parameter is rounded.
                self._update(master, gradient.astype("float32"), None, rates[rule.lr_ratio], rule, state)
                paddle.assign(master.astype(parameter.dtype), parameter)
            else:
                # With a master copy the kernel accepts an fp32 gradient; rounding it would undo its fp32 sum.
                gradient = gradient if master is not None else gradient.astype(parameter.dtype)
                self._update(parameter, gradient, master, rates[rule.lr_ratio], rule, state)
            parameter._bump_inplace_version()  # the kernel does not do this, and products rely on it (nn/product.py)
        self.parameters.publish(updated)

    def _update(
        self,
        parameter: paddle.Tensor,
        gradient: paddle.Tensor,
        master: paddle.Tensor | None,
        rate: paddle.Tensor,
        rule: ParamRule,
        state: Mapping[str, paddle.Tensor],
    ) -> None:
        """Paddle's fused kernel: parameter, master and state in place."""
        paddle._C_ops.adamw_(
            parameter,
            gradient,
            rate,
            state["moment1"],
            state["moment2"],
            None,  # moment2_max: AMSGrad is off
            state["beta1_pow"],
            state["beta2_pow"],
            master,
            None,  # found_inf: a step whose gradients are not finite does not come here
            self.beta1,
            self.beta2,
            self.epsilon,
            1.0,
            rule.weight_decay,
            rule.weight_decay > 0.0,
            False,  # lazy_mode
            1000,  # min_row_size_to_use_multithread
            master is not None,
            False,  # use_global_beta_pow
            False,  # amsgrad
        )

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every entry of the state, "parameter name/field", and its whole shape: the parameter's, or [1]."""
        return {f"{name}/{field}": self._shape(name, field) for name, fields in self.state.items() for field in fields}

    def _shape(self, name: str, field: str) -> tuple[int, ...]:
        return (1,) if field in POWERS else self.parameters.entries[name].shape

    def state_array(self, key: str) -> np.ndarray:
        """One entry of the state, whole, fp32. All ranks of the parameter's shard group have to call it together."""
        name, field = key.rsplit("/", 1)
        tensor = self.state[name][field]
        return tensor.numpy() if field in POWERS else self.parameters.gather(name, tensor)

    def load_state_array(self, key: str, array: np.ndarray) -> None:
        """Set one entry of the state from the whole array. KeyError if the optimizer has no such entry, ValueError if
        its shape differs.
        """
        name, field = key.rsplit("/", 1)
        tensor, shape = self.state[name][field], self._shape(name, field)
        if array.shape != shape:
            raise ValueError(f"{key}: shape {array.shape}, not {shape}")
        tensor.set_value(array if field in POWERS else self.parameters.scatter(name, array))
