"""Attach products in FP8 (precision/fp8.py) to a model, and say what is in FP8."""

from collections import defaultdict

from erniekit.models.decoder import CausalLM, DecoderLayer
from erniekit.models.products import attach_products, parts_of, products
from erniekit.moe.experts import Experts
from erniekit.nn.linear import EVERY_PART, Part, Projection
from erniekit.precision.fp8 import Fp8Options
from erniekit.precision.fp8_counts import Fp8Counts
from erniekit.precision.fp8_product import Fp8Product
from erniekit.utils.errors import ConfigError
from erniekit.utils.wording import count_of


def attach_fp8(model: CausalLM, options: Fp8Options) -> None:
    """Let the chosen parts of the layers multiply in FP8. Raises ConfigError for a matrix that the back end refuses;
    no weight has to be read before.
    """
    attach_products(model, options.product, options.parts)
    for name, (projection, product) in products(model).items():
        if isinstance(product, Fp8Product):
            reason = product.backend.refuses(projection.in_features, projection.out_features)
            if reason:
                raise ConfigError(
                    f"fp8: {name} {reason}. Leave its part out of fp8_modules, or use fewer tensor-parallel ranks"
                )
    for number in model.model.layers.numbers if "experts" in options.parts else ():
        for part, module in parts_of(model.model.layers[number]):
            if part == "experts":
                assert isinstance(module, Experts)
                module.block = options.experts(number)
                module.takes_weights = options.routing_weight == "before"


def describe_fp8(model: CausalLM, options: Fp8Options) -> str:
    """For the log: what multiplies in FP8 on this process, and what does not."""
    matrices: dict[Part, int] = defaultdict(int)
    others: set[Part] = set()
    for layer in model.model.layers:
        for part, module in parts_of(layer):
            count = sum(isinstance(each, Fp8Product) for each in module.sublayers())
            matrices[part] += count
            others |= set() if count else {part}
    kept = [part for part in sorted(EVERY_PART & others) if not matrices[part]]
    kept += ["multi-token prediction"] if model.config.num_nextn_predict_layers else []
    kept += ["vision transformer", "resampler"] if model.config.vision is not None else []
    found = (
        ", ".join(f"{part} ({count_of(count, 'weight')})" for part, count in matrices.items() if count)
        or "nothing here"
    )
    without = ", ".join([*kept, "routers", "norms", "embedding", "head"])
    return f"FP8 ({options.describe()}): {found}; without FP8: {without}"


def adapted_layers(model: CausalLM, options: Fp8Options) -> list[int]:
    """The layers of `options.recompute_layers` on this process whose experts have adapters, which need the products of
    the projections, so that nothing is computed again there.
    """
    numbers = options.recompute_layers & set(model.model.layers.numbers) if "experts" in options.parts else ()
    return [number for number in sorted(numbers) if _experts_have_adapters(model.model.layers[number])]


def _experts_have_adapters(layer: DecoderLayer) -> bool:
    experts = (module for part, module in parts_of(layer) if part == "experts")
    projections = (each for module in experts for each in module.sublayers() if isinstance(each, Projection))
    return any(projection.adapter is not None for projection in projections)


def fp8_counts(model: CausalLM) -> Fp8Counts | None:
    """What the products of a model count; None if none is in FP8."""
    found = (product for _, product in products(model).values() if isinstance(product, Fp8Product))
    first = next(found, None)
    return None if first is None else first.backend.counts
