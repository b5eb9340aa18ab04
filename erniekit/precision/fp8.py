"""Which products of a run are in FP8, and by what they are computed (the keys of config/schema_fp8.py)."""

from dataclasses import dataclass
from typing import Literal, cast

from erniekit.config.schema import Config
from erniekit.nn.linear import Part, Projection
from erniekit.precision import fp8_kernels
from erniekit.precision.fp8_emulated import Emulated, Recipe, Scaling
from erniekit.precision.fp8_experts import Fp8Experts
from erniekit.precision.fp8_kernels import PaddleKernels
from erniekit.precision.fp8_product import Backend, Fp8Product
from erniekit.precision.fp8_tensor import Fp8Format
from erniekit.utils.errors import ConfigError


@dataclass(frozen=True)
class Fp8Options:
    """`parts` of the layers multiply in FP8, by `backend`. `stores_fp8`: what is kept for the backward pass is in FP8.
    `routing_weight`: on which side of down_proj experts multiply by it. `recompute_layers`: numbers of layers whose
    experts do not keep the result of up_gate_proj.
    """

    backend: Backend
    parts: frozenset[Part]
    stores_fp8: bool
    routing_weight: Literal["before", "after"]
    recompute_layers: frozenset[int]

    def product(self, projection: Projection) -> Fp8Product:
        """The product of a projection (nn.linear.ProductFactory)."""
        return Fp8Product(self.backend, "FP8", self.stores_fp8)

    def experts(self, layer: int) -> Fp8Experts:
        """What computes the experts of a layer."""
        return Fp8Experts(self.backend, self.stores_fp8, layer in self.recompute_layers)

    def describe(self) -> str:
        """For the log: what the codes and scales are."""
        recipe = self.backend.recipe
        scales = "power-of-two scales" if recipe.pow2 else "real scales"
        return f"{recipe.scaling}, E4M3, gradients {recipe.gradients.upper()}, {scales}, {self.backend.name}"


def recipe_of(cfg: Config) -> Recipe:
    """How a run in FP8 quantises."""
    return Recipe(cast(Scaling, cfg.fp8), cfg.fp8_scale == "pow2", cast(Fp8Format, cfg.fp8_gradients))


def choose_fp8(cfg: Config, device: str, is_assumed: bool = False) -> Fp8Options | None:
    """The options of a run on a device ("cpu", "gpu:0"); None without FP8. Raises ConfigError where the device cannot
    multiply in FP8 and the run does not ask for emulation; a device that is only assumed is not asked.
    """
    if cfg.fp8 == "none":
        return None
    recipe = recipe_of(cfg)
    reason = "" if cfg.emulate_precision or is_assumed else fp8_kernels.missing(recipe, device, cfg.compute_type)
    if reason:
        raise ConfigError(
            f"fp8: {cfg.fp8}: {reason}. emulate_precision: true computes the same numbers with fp32 products, slowly; "
            "fp8: none trains without"
        )
    return Fp8Options(
        Emulated(recipe) if cfg.emulate_precision else PaddleKernels(recipe),
        frozenset(cast(tuple[Part, ...], cfg.fp8_modules)),
        cfg.fp8_store,
        cast(Literal["before", "after"], cfg.fp8_routing_weight),
        frozenset(cfg.fp8_recompute_up_gate_layers),
    )
