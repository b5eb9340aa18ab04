"""Which projections a run fake-quantises, and how (the keys of config/schema_qat.py)."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from erniekit.config.schema import Config
from erniekit.config.schema_qat import STATIC
from erniekit.nn.linear import Projection
from erniekit.precision import codes
from erniekit.precision.fake_quant import FakeQuant, InputCodes, MovingRange, Recipe
from erniekit.precision.fake_rounding import Grid
from erniekit.precision.fp8_tensor import Tile
from erniekit.utils.errors import ConfigError

# Numbers of inputs that share a scale in 4 bits, the preferred one first (quantize/schemes.py has the same).
GROUPS = (128, 64, 32)

_INT8_TOKENS = InputCodes(Grid("int", -127.0, 127.0, Tile(1, None)))
_FP8_GROUPS = InputCodes(Grid("e4m3", -448.0, 448.0, Tile(1, 128)))
_FP8_WHOLE = Grid("e4m3", -448.0, 448.0, Tile(None, None))

_W8A8 = Recipe(codes.full_range(8), _INT8_TOKENS)
_WINT8, _WINT4 = Recipe(codes.full_range(8)), Recipe(codes.full_range(4, group=128))
# By qat: the projections of attention, dense blocks and shared experts, and the routed experts.
_RECIPES = {
    "w8a8": (_W8A8, _W8A8),
    "fp8": (Recipe(codes.FP8_BLOCK, _FP8_GROUPS),) * 2,
    STATIC: (Recipe(codes.FP8_TENSOR, InputCodes(_FP8_WHOLE)),) * 2,
    "w4a8": (_W8A8, Recipe(codes.symmetric(4), _INT8_TOKENS)),
    "wint4": (_WINT4, _WINT4),
    "wint8": (_WINT8, _WINT8),
    "wint4/8": (_WINT8, _WINT4),
}


@dataclass(frozen=True)
class QatOptions:
    """`projections`: how those of attention, dense blocks and shared experts are fake-quantised; `experts`: the routed
    ones. `group`: the number of inputs that share a scale where a scheme has groups; None: chosen by the model's sizes.
    """

    name: str
    projections: Recipe
    experts: Recipe
    group: int | None = None

    def for_widths(self, widths: Iterable[int]) -> "QatOptions":
        """The options for a model whose projections have these numbers of inputs: as an export does, the first of
        GROUPS that divides them all. ConfigError if there is none.
        """
        if self.projections.weight.group is None and self.experts.weight.group is None:
            return self
        every, tried = sorted(set(widths)), GROUPS if self.group is None else (self.group,)
        group = next((size for size in tried if not any(width % size for width in every)), None)
        if group is None:
            raise ConfigError(
                f"qat: {self.name}: projections with {', '.join(map(str, every))} inputs do not divide into groups of "
                f"{' or '.join(map(str, tried))}: set quantization_group_size to a divisor of all, or qat: wint8"
            )
        return replace(self, projections=_grouped(self.projections, group), experts=_grouped(self.experts, group))

    def product(self, projection: Projection) -> FakeQuant:
        """The product of a projection (nn.linear.ProductFactory)."""
        recipe = self.projections if projection.num_experts is None else self.experts
        return FakeQuant(recipe, self.name, tuple(projection.parts.values()), projection.num_experts)


def _grouped(recipe: Recipe, group: int) -> Recipe:
    spec = recipe.weight
    return recipe if spec.group is None else replace(recipe, weight=replace(spec, group=group))


def choose_qat(cfg: Config) -> QatOptions | None:
    """The options of a run; None without quantisation-aware training."""
    if cfg.qat == "none":
        return None
    recipes = list[Recipe]()
    for recipe in _RECIPES[cfg.qat]:
        if cfg.qat == STATIC:
            moving = MovingRange(cfg.apply_online_actscale_step, cfg.actscale_moving_rate)
            rotation = cfg.hadamard_block_size if cfg.apply_hadamard else None
            recipe = replace(recipe, inputs=InputCodes(_FP8_WHOLE, moving), rotation=rotation)
        recipes.append(
            replace(recipe, rounds_input_grad=cfg.quant_input_grad, rounds_weight_grad=cfg.quant_weight_grad)
        )
    return QatOptions(cfg.qat, recipes[0], recipes[1], cfg.quantization_group_size)


def describe_recipe(recipe: Recipe) -> str:
    """For the log: what is rounded, and what shares a scale."""
    spec, inputs = recipe.weight, recipe.inputs
    kind = "E4M3" if spec.kind == "e4m3" else f"int{spec.bits}"
    shared = "channel" if spec.group is None else f"{spec.group} inputs"
    if spec.whole:
        shared = "matrix"
    elif spec.block is not None:
        shared = f"{spec.block[0]} x {spec.block[1]}"
    text = f"weights {kind}, a scale for each {shared}"
    if inputs is not None:
        tile = inputs.grid.tile
        each = "token" if tile.columns is None else f"token and {tile.columns} inputs"
        each = "matrix, which moves slowly" if inputs.moving is not None else each
        text += f"; inputs {'E4M3' if inputs.grid.kind == 'e4m3' else 'int8'}, a scale for each {each}"
    if recipe.rotation is not None:
        text += f"; rotated in blocks of {recipe.rotation}"
    return text
