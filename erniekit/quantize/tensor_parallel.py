"""With how many tensor-parallel ranks an engine can divide a quantised file: no scale may belong to two ranks."""

from dataclasses import dataclass

from erniekit.checkpoint.quantised_codecs import PackQuantized
from erniekit.models.config import ModelConfig
from erniekit.quantize.schemes import Matrix, Scheme

DEGREES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Degrees:
    """`good`: the degrees of DEGREES that the file is good for. `limit`: why not for the next larger one; empty where
    there is none.
    """

    good: tuple[int, ...]
    limit: str

    def __str__(self) -> str:
        names = ", ".join(str(degree) for degree in self.good) or "none"
        return f"tensor-parallel degrees: {names}{f' ({self.limit})' if self.limit else ''}"


def degrees_of(scheme: Scheme, config: ModelConfig) -> Degrees:
    """The degrees of a file of a scheme. Attention divides by heads, the first projections by their outputs, o_proj and
    down_proj by their inputs. The weights of -Paddle files are in the order of a kernel, so that one rank has them all.
    """
    if scheme.format == "paddle":
        return Degrees((1,), "FastDeploy reads one file for each degree: codes in the order of a kernel do not divide")
    matrices = {(matrix.name.rpartition(".")[2], matrix.shape): matrix for matrix in scheme.every_matrix(config)}
    good: list[int] = []
    for degree in DEGREES:
        reasons = [_refused(matrix, degree, config) for matrix in matrices.values()]
        reason = next((reason for reason in reasons if reason), "")
        if reason:
            return Degrees(tuple(good), f"{degree}: {reason}")
        good.append(degree)
    return Degrees(tuple(good), "")


def _refused(matrix: Matrix, degree: int, config: ModelConfig) -> str:
    """Why a matrix cannot be divided by `degree` ranks; empty if it can."""
    kind, (num_out, num_in), spec = matrix.name.rpartition(".")[2], matrix.shape, matrix.codec.spec
    by_inputs = kind in ("o_proj", "down_proj")
    units = {"q_proj": config.num_attention_heads, "o_proj": config.num_attention_heads}.get(kind)
    if kind in ("k_proj", "v_proj"):
        units = config.num_key_value_heads
        degree = min(degree, units)  # with fewer heads than ranks, ranks repeat them
    whole = num_in if by_inputs else num_out
    if (units or whole) % degree:
        return f"{matrix.name} has {f'{units} heads' if units else whole}"
    share = whole // degree
    if by_inputs:
        unit = spec.block[1] if spec.block else spec.group or 1
        if isinstance(matrix.codec, PackQuantized):
            unit = max(unit, 32 // spec.bits)  # codes of a word
    else:
        unit = spec.block[0] if spec.block else 1
    if share % unit:
        return f"a rank has {share} {'inputs' if by_inputs else 'outputs'} of {matrix.name}, not a multiple of {unit}"
    return ""
