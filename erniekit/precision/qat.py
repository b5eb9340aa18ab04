"""Which projections a run fake-quantises, and how (the keys of config/schema_qat.py)."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from erniekit.config.schema import Config
from erniekit.config.schema_qat import STATIC
from erniekit.nn.linear import Projection
from erniekit.precision import codes
from erniekit.precision.fake_quant import FakeQuant, InputCodes, MovingRange, Recipe, Rotation
from erniekit.precision.fake_rounding import Grid
from erniekit.precision.fp8_tensor import Tile
from erniekit.utils.errors import ConfigError

# Numbers of inputs that share a scale in 4 bits, the preferred one first (quantize/schemes.py has the same).
GROUPS = (128, 64, 32)

_INT8_TOKENS = InputCodes(Grid("int", -127.0, 127.0, Tile(1, None)))
_FP8_GROUPS = InputCodes(Grid("e4m3", -448.0, 448.0, Tile(1, 128)))
# All inputs of a matrix share a scale; `choose_qat` says how it moves.
_INT8_WHOLE = InputCodes(Grid("int", -127.0, 127.0, Tile(None, None)))
_FP8_WHOLE = InputCodes(Grid("e4m3", -448.0, 448.0, Tile(None, None)))

_WINT8, _WINT4 = Recipe(codes.full_range(8)), Recipe(codes.full_range(4, group=128))
# The orders of the rotations in FastDeploy's kernels: of every input in FP8, and of those of down_proj of experts.
_FP8_ROTATION, _W4A8_ROTATION = 32, 128


@dataclass(frozen=True)
class QatOptions:
    """`projections`: how those of attention, dense blocks and shared experts are fake-quantised; `experts`: the routed
    ones' up_gate_proj, and `experts_down` their down_proj. `group`: the number of inputs that share a scale where a
    scheme has groups; None: chosen by the model's sizes.
    """

    name: str
    projections: Recipe
    experts: Recipe
    experts_down: Recipe
    group: int | None = None

    def for_widths(self, widths: Iterable[int], widths_of_experts: Iterable[int]) -> "QatOptions":
        """The options for a model whose projections, and those of whose routed experts, have these numbers of inputs:
        as an export does, the first of GROUPS that divides all that have groups. ConfigError if there is none.
        """
        if self.experts.weight.group is None:
            return self
        every = sorted(set(widths_of_experts if self.projections.weight.group is None else widths))
        tried = GROUPS if self.group is None else (self.group,)
        group = next((size for size in tried if not any(width % size for width in every)), None)
        if group is None:
            raise ConfigError(
                f"qat: {self.name}: projections with {', '.join(map(str, every))} inputs do not divide into groups of "
                f"{' or '.join(map(str, tried))}: set quantization_group_size to a divisor of all, or qat: wint8"
            )
        projections, experts, down = (
            _grouped(recipe, group) for recipe in (self.projections, self.experts, self.experts_down)
        )
        return replace(self, projections=projections, experts=experts, experts_down=down)

    def product(self, projection: Projection) -> FakeQuant:
        """The product of a projection (nn.linear.ProductFactory)."""
        recipe = self.projections
        if projection.num_experts is not None:
            recipe = self.experts if projection.parts else self.experts_down
        return FakeQuant(recipe, self.name, tuple(projection.parts.values()), projection.num_experts)


def _grouped(recipe: Recipe, group: int) -> Recipe:
    spec = recipe.weight
    return recipe if spec.group is None else replace(recipe, weight=replace(spec, group=group))


def choose_qat(cfg: Config) -> QatOptions | None:
    """The options of a run; None without quantisation-aware training."""
    if cfg.qat == "none":
        return None
    projections, experts, down = _recipes(cfg)
    if cfg.apply_hadamard and cfg.qat == STATIC:
        rotation = Rotation(cfg.hadamard_block_size or _FP8_ROTATION)
        projections, experts, down = (replace(each, rotation=rotation) for each in (projections, experts, down))
    elif cfg.apply_hadamard and cfg.qat == "w4a8":
        down = replace(down, rotation=Rotation(cfg.hadamard_block_size or _W4A8_ROTATION, normalised=True))
    return QatOptions(cfg.qat, projections, experts, down, cfg.quantization_group_size)


def _recipes(cfg: Config) -> tuple[Recipe, Recipe, Recipe]:
    """The recipes of the projections, of experts' up_gate_proj and of experts' down_proj; without rotations."""
    w8a8, fp8 = Recipe(codes.full_range(8), _INT8_TOKENS), Recipe(codes.FP8_BLOCK, _FP8_GROUPS)
    chosen = {
        "w8a8": (w8a8, w8a8),
        "fp8": (fp8, fp8),
        STATIC: (Recipe(codes.FP8_TENSOR, _FP8_WHOLE),) * 2,
        "w4a8": (Recipe(codes.symmetric(8)), Recipe(codes.symmetric(4), _INT8_WHOLE)),
        "wint4": (_WINT4, _WINT4),
        "wint8": (_WINT8, _WINT8),
        "wint4/8": (_WINT8, _WINT4),
    }[cfg.qat]
    moving = MovingRange(cfg.apply_online_actscale_step, cfg.actscale_moving_rate)
    projections, experts = (_of_run(cfg, recipe, moving) for recipe in chosen)
    return projections, experts, experts


def _of_run(cfg: Config, recipe: Recipe, moving: MovingRange) -> Recipe:
    if recipe.inputs in (_INT8_WHOLE, _FP8_WHOLE):
        recipe = replace(recipe, inputs=replace(recipe.inputs, moving=moving))
    return replace(recipe, rounds_input_grad=cfg.quant_input_grad, rounds_weight_grad=cfg.quant_weight_grad)


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
        text += f"; rotated in blocks of {recipe.rotation.order}"
    return text
