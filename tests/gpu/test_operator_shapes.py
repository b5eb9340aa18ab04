"""Every GPU-only operator that the package calls passes Paddle's own inference of shapes and element types, forward and
backward, at the sizes of a published model; and element types without a GPU kernel are refused. See
tests/support/gpu_shapes for what this cannot show.
"""

from typing import Any

import pytest
from support.gpu_shapes import KERNELS, Call, infer
from support.worlds import World

B, F, E4M3 = "bfloat16", "float32", "float8_e4m3fn"
T, D, WIDTH, EXPERTS, K = 96, 2560, 3072, 64, 6  # tokens, model, gate|up of an expert, experts, choices (21B-A3B)
R = T * K
COUNTS = [R // EXPERTS] * EXPERTS
HEADS, KV_HEADS, HEAD = 20, 4, 128
ATTENTION = {"q": (B, (1, T, HEADS, HEAD)), "k": (B, (1, T, KV_HEADS, HEAD)), "v": (B, (1, T, KV_HEADS, HEAD))}


def _calls() -> dict[str, Call]:
    return _decoder_calls() | _expert_calls() | _other_calls() | _fp8_calls() | _low_bit_calls()


def _decoder_calls() -> dict[str, Call]:
    """As the package calls them."""
    from erniekit.nn import fused

    tables = {"cos": (F, (1, T, 1, HEAD)), "sin": (F, (1, T, 1, HEAD))}
    ends = {"ends": ("int32", (1, 1, T, 1))}
    return {
        "rms norm": Call(
            {"x": (B, (T, D)), "w": (B, (D,))}, lambda x, w: fused.rms_norm(x, w, 1e-5), ((B, (T, D)),), ("x", "w")
        ),
        "rms norm in fp32": Call(
            {"x": (F, (T, D)), "w": (F, (D,))}, lambda x, w: fused.rms_norm(x, w, 1e-5), ((F, (T, D)),), ("x", "w")
        ),
        "rotation": Call(
            {"x": (F, (T, HEADS + KV_HEADS, HEAD)), **tables},
            lambda x, cos, sin: fused.rotate(x, cos, sin),
            ((F, (T, HEADS + KV_HEADS, HEAD)),),
            ("x",),
        ),
        "swiglu": Call({"x": (B, (T, WIDTH))}, lambda x: fused.swiglu(x), ((B, (T, WIDTH // 2)),), ("x",)),
        "flash mask": Call(
            ATTENTION | ends,
            lambda q, k, v, ends: fused.flash_mask(q, k, v, ends, 0.0),
            ((B, (1, T, HEADS, HEAD)),),
            ("q", "k", "v"),
        ),
        "flash mask with dropout": Call(
            ATTENTION | ends,
            lambda q, k, v, ends: fused.flash_mask(q, k, v, ends, 0.1),
            ((B, (1, T, HEADS, HEAD)),),
            ("q", "k", "v"),
        ),
    }


def _expert_calls() -> dict[str, Call]:
    from erniekit.nn import fused

    rows, stack = (B, (R, D)), (B, (EXPERTS, D, WIDTH))
    choice = {"experts": ("int32", (T, K)), "weights": (F, (T, K))}
    return {
        "grouped product": Call(
            {"x": rows, "w": stack}, lambda x, w: fused.grouped_product(x, w, COUNTS), ((B, (R, WIDTH)),)
        ),
        "grouped product, gradient of rows": Call(
            {"dy": (B, (R, WIDTH)), "w": stack},
            lambda dy, w: fused.grouped_product(dy, w, COUNTS, transpose_right=True),
            (rows,),
        ),
        "grouped product, gradient of weights": Call(
            {"x": rows, "dy": (B, (R, WIDTH))},
            lambda x, dy: fused.grouped_product(x, dy, COUNTS, transpose_left=True),
            (stack,),
        ),
        "permute": Call(
            {"x": (B, (T, D)), **choice},
            lambda x, experts, weights: fused.permute(x, experts, weights, COUNTS),
            (rows, ("int32", (T, EXPERTS)), (F, (R, 1))),
        ),
        "unpermute": Call(
            {"x": rows, "row_of": ("int32", (T, EXPERTS)), "experts": ("int32", (T, K)), "weights": (F, (R, 1))},
            lambda x, row_of, experts, weights: fused.unpermute(x, row_of, experts, weights),
            ((B, (T, D)),),
        ),
        "add product": Call(
            {"x": (B, (T, D)), "dy": (B, (T, WIDTH)), "total": (F, (D, WIDTH))},
            lambda x, dy, total: fused.add_product(x, dy, total),
            ((F, (D, WIDTH)),),
        ),
        "add product, first": Call(
            {"x": (B, (T, D)), "dy": (B, (T, WIDTH))},
            lambda x, dy: fused.add_product(x, dy, None),
            ((F, (D, WIDTH)),),
        ),
    }


def _other_calls() -> dict[str, Call]:
    import paddle

    ops, ends = paddle._C_ops, {"ends": ("int32", (1, 1, T, 1))}
    return {
        "cross-entropy of fp32 logits": Call(
            {"logits": (F, (T, 103424)), "labels": ("int64", (T, 1))},
            lambda logits, labels: ops.cross_entropy_with_softmax(logits, labels, False, True, True, -100, -1),
            ((F, (T, 103424)), (F, (T, 1))),
        ),
        # What FLAGS_flash_attn_version=3 makes of the same call, and attention without a mask.
        "flash mask v2": Call(
            ATTENTION | ends,
            lambda q, k, v, ends: ops.flashmask_attention_v2(q, k, v, ends, None, HEAD**-0.5, True)[0],
            ((B, (1, T, HEADS, HEAD)),),
            ("q", "k", "v"),
        ),
        # In fp32, so that a main gradient would never be rounded.
        "embedding gradient": Call(
            {"ids": ("int64", (T,)), "total": (F, (1024, D)), "dy": (B, (T, D))},
            lambda ids, total, dy: ops.embedding_grad_add_to(ids, total, dy),
            ((F, (1024, D)),),
        ),
    }


def _fp8_calls() -> dict[str, Call]:
    """1x128 tiles of activations, 128x128 blocks of weights."""
    import paddle
    from paddle.incubate.nn import functional as incubate

    ops = paddle._C_ops
    return {
        "fp8 quantise rows": Call(
            {"x": (B, (256, 512))},
            lambda x: incubate.fp8_quant_blockwise(x, quant_method="1x128", output_scale_transpose=True),
            ((E4M3, (256, 512)), (F, (4, 256))),
        ),
        "fp8 quantise rows and columns": Call(
            {"x": (B, (256, 512))},
            lambda x: incubate.fp8_quant_blockwise(x, input_transpose=True, quant_method="1x128"),
            ((E4M3, (256, 512)), (F, (4, 256)), (E4M3, (512, 256)), (F, (2, 512))),
        ),
        "fp8 quantise a weight": Call(
            {"x": (B, (256, 512))},
            lambda x: incubate.fp8_quant_blockwise(x, quant_method="128x128", output_scale_transpose=False),
            ((E4M3, (256, 512)), (F, (2, 4))),
        ),
        # As incubate.nn.functional.fp8_gemm_blockwise calls it, which makes tensors that a static program has not.
        "fp8 product": Call(
            {
                "a": (E4M3, (256, 640)),
                "sa": (F, (5, 256)),
                "b": (E4M3, (384, 640)),
                "sb": (F, (3, 8)),  # a multiple of four in a row
                "out": (B, (256, 384)),
                "empty": (F, (0,)),
                "workspace": ("uint8", (33554432,)),
            },
            lambda a, sa, b, sb, out, empty, workspace: ops.fp8_gemm_blockwise_(
                b, sb, a, sa, out, empty, empty, workspace, True, False, False, False, True, 112, False, True
            )[0],
            ((B, (256, 384)),),
        ),
        "fp8 stack and transpose": Call(
            {"a": (B, (256, 512)), "b": (B, (256, 512))},
            lambda a, b: incubate.fused_stack_transpose_quant([a, b], transpose=True),
            ((E4M3, (1024, 256)), (F, (8, 2))),
        ),
        "fp8 back to bf16": Call(
            {"x": (E4M3, (256, 512)), "scale": (F, (256, 4))},
            lambda x, scale: incubate.fused_act_dequant(x, scale),
            ((B, (256, 512)),),
        ),
        "fp8 transpose by expert": Call(
            {"x": (B, (256, 512))},
            lambda x: [y for part in incubate.fused_transpose_split_quant(x, None, [128, 128], True) for y in part],
            ((E4M3, (512, 128)), (E4M3, (512, 128)), (F, (1, 512)), (F, (1, 512))),
        ),
        "fp8 swiglu": Call(
            {"x": (B, (256, 512)), "prob": (F, (256,))},
            lambda x, prob: incubate.fused_weighted_swiglu_act_quant(x, prob, True),
            ((E4M3, (256, 256)), (F, (256, 2))),
        ),
        "fp8 swiglu, backward": Call(
            {"o1": (B, (256, 512)), "do": (B, (256, 256)), "prob": (F, (256, 1))},
            lambda **x: incubate.fused_swiglu_weighted_bwd(x["o1"], x["do"], x["prob"]),
            ((B, (256, 512)), (F, (256, 1)), (B, (256, 256))),
        ),
    }


def _low_bit_calls() -> dict[str, Call]:
    """Weights in 8 and 4 bits, as precision/quantized_weight.py calls them."""
    from paddle.nn.quant import weight_only_linear

    calls: dict[str, Call] = {}
    for bits, group in ((8, -1), (4, 64)):
        codes = ("int8", (WIDTH, D) if bits == 8 else (WIDTH // 2, D))
        scales = (B, (WIDTH,) if bits == 8 else (D // 64, WIDTH))
        calls[f"product with int{bits}"] = Call(
            {"x": (B, (T, D)), "codes": codes, "scales": scales},
            lambda x, codes, scales, bits=bits, group=group: weight_only_linear(
                x, codes, weight_scale=scales, weight_dtype=f"int{bits}", arch=80, group_size=group
            ),
            ((B, (T, WIDTH)),),  # its own gradient is not used: with scales by group there is none
        )
    return calls


NAMES = [
    *("rms norm", "rms norm in fp32", "rotation", "swiglu", "flash mask", "flash mask with dropout"),
    *("grouped product", "grouped product, gradient of rows", "grouped product, gradient of weights"),
    *("permute", "unpermute", "add product", "add product, first", "cross-entropy of fp32 logits", "flash mask v2"),
    *("embedding gradient", "fp8 quantise rows", "fp8 quantise rows and columns", "fp8 quantise a weight"),
    *("fp8 product", "fp8 stack and transpose", "fp8 back to bf16", "fp8 transpose by expert", "fp8 swiglu"),
    *("fp8 swiglu, backward", "product with int8", "product with int4"),
]


def inferred() -> dict[str, Any]:
    """By name of the call: what is expected, and what Paddle infers, or its error."""
    found = {}
    for name, call in _calls().items():
        try:
            outputs, gradients = infer(call)
        except Exception as error:
            found[name] = str(error)[-600:]
            continue
        wanted = {key: call.inputs[key] for key in call.inputs_with_gradient}
        found[name] = (outputs[: len(call.expected)], gradients), (list(call.expected), wanted)
    return found


@pytest.fixture(scope="module")
def found(shapes: World) -> dict[str, Any]:
    (result,) = shapes.run(inferred)
    assert set(result) == set(NAMES)
    return result


@pytest.mark.parametrize("name", NAMES)
def test_a_call_passes_paddles_inference(found: dict[str, Any], name: str):
    assert not isinstance(found[name], str), found[name]
    made, expected = found[name]
    assert made == expected


def refused() -> list[str]:
    """Paddle's errors for calls whose element types have no GPU kernel."""
    from erniekit.nn import fused

    halves = {name: ("float16", shape) for name, (_, shape) in {"x": (B, (T, D)), "w": (B, (D,))}.items()}
    wide = {name: (F, shape) for name, (_, shape) in ATTENTION.items()} | {"ends": ("int32", (1, 1, T, 1))}
    calls = [
        Call(halves, lambda x, w: fused.rms_norm(x, w, 1e-5), ()),
        Call(wide, lambda q, k, v, ends: fused.flash_mask(q, k, v, ends, 0.0), ()),
        Call(
            {"x": (F, (T, D)), "e": ("int32", (T, K)), "w": (F, (T, K))},
            lambda x, e, w: fused.permute(x, e, w, COUNTS),
            (),
        ),
    ]
    errors = []
    for call in calls:
        try:
            errors.append(f"accepted: {infer(call)}")
        except Exception as error:
            errors.append(str(error))
    return errors


def test_element_types_without_a_kernel_are_refused(shapes: World):
    (errors,) = shapes.run(refused)
    assert all("expected_dtype" in error for error in errors), errors


def test_the_package_uses_no_element_type_without_a_kernel():
    from erniekit.nn import fused

    for operator in fused.OPERATORS:
        assert set(operator.dtypes) <= set(KERNELS[operator.name]), operator.name
