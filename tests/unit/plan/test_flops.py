"""FLOPs against published runs: a source that gives both TFLOP/s and tokens a second has counted them."""

import dataclasses

import published_runs
import pytest

from erniekit.plan.flops import FULL, NOTHING, recomputed_by, token_flops
from erniekit.plan.work import Core, Layer, Product, Work

GIGA = 1e9

# Model, sequence, with the block for multi-token prediction, TFLOP/s and tokens a second and GPU, and how exactly these
# are given (both are rounded).
PUBLISHED = [
    ("llama3-8b", 8192, False, 744, 14451, 0.002),
    ("llama3-70b", 8192, False, 719, 1602, 0.002),
    ("llama3-405b", 8192, False, 737, 292, 0.003),
    ("llama3-405b", 8192, False, 784, 311, 0.003),
    ("deepseek-v3", 4096, True, 338, 1297, 0.003),
    ("deepseek-v3", 4096, False, 385, 1542, 0.003),  # DeepSeek's own count has no multi-token prediction
    ("deepseek-v3", 4096, False, 782, 3139, 0.004),
    ("qwen3-30b", 4096, False, 121, 5275, 0.005),
    ("qwen3-235b", 4096, False, 233, 1575, 0.003),
]


@pytest.mark.parametrize(("model", "sequence", "ahead", "tflops", "tokens", "tolerance"), PUBLISHED)
def test_the_causal_count_is_that_of_published_runs(
    model: str, sequence: int, ahead: bool, tflops: float, tokens: float, tolerance: float
):
    counted = token_flops(published_runs.operations(model, ahead), [sequence]).causal
    assert counted == pytest.approx(tflops * 1e12 / tokens, rel=tolerance)


def test_the_full_square_is_that_of_deepseek_and_megatron_examples():
    deepseek = token_flops(published_runs.operations("deepseek-v3"), [4096]).full
    assert deepseek == pytest.approx(432e12 / 1542, rel=0.005)
    eight = token_flops(published_runs.operations("llama3-8b"), [8192]).full
    assert eight == pytest.approx(800e12 / 13812, rel=0.005)


@pytest.mark.parametrize(
    ("model", "billions", "causal", "full"),
    [("ernie-0.3b", 0.467, 3.07, 3.98), ("ernie-21b", 22.1, 21.85, 23.6), ("ernie-300b", 299.4, 293, 304)],
)
def test_ernie_models_by_hand(model: str, billions: float, causal: float, full: float):
    work = published_runs.operations(model)
    flops = token_flops(work, [4096])
    assert flops.causal / GIGA == pytest.approx(causal, rel=0.003)
    assert flops.full / GIGA == pytest.approx(full, rel=0.003)
    assert work.parameters / GIGA == pytest.approx(billions, rel=0.005)


def one_layer(trained: bool = True) -> Work:
    products = (Product("attention", 4, 6, trained=trained), Product("mlp", 4, 10, trained=trained))
    return Work(4, (), (Layer("dense", 4, products, (Core(2, 2, 2, 2),)),), ())


def test_a_frozen_weight_has_no_gradient():
    products, core = 2 * (4 * 6 + 4 * 10), Core(2, 2, 2, 2).flops([8])
    assert token_flops(one_layer(), [8]).causal == 3 * products + 3 * core
    assert token_flops(one_layer(trained=False), [8]).causal == 2 * products + 3 * core


def test_recomputation_is_hardware_not_model_flops():
    plain, again = token_flops(one_layer(), [8], NOTHING), token_flops(one_layer(), [8], FULL)
    assert plain.causal == again.causal
    assert plain.recomputed == 0
    assert again.hardware == pytest.approx(plain.causal * 4 / 3)
    attention = token_flops(one_layer(), [8], recomputed_by({"attention"}, False, ()))
    assert attention.recomputed == 2 * 4 * 6 + Core(2, 2, 2, 2).flops([8])
    kept = dataclasses.replace(FULL, not_in=(0,))
    assert token_flops(one_layer(), [8], kept).recomputed == 0


def test_a_reference_model_costs_one_forward_pass():
    plain, both = token_flops(one_layer(), [8]), token_flops(one_layer(), [8], passes_ahead=1)
    assert both.causal == pytest.approx(plain.causal * 4 / 3)


def test_packed_documents_attend_within_themselves():
    core = Core(1, 1, 4, 4)
    assert core.flops([8]) == 2 * 8 * 8 / 2
    assert core.flops([8], half=False) == 2 * core.flops([8])
    assert core.flops([4, 4]) == core.flops([8]) / 2
    assert core.flops([6, 2]) == pytest.approx(2 * 8 * (36 + 4) / 8 / 2)


def test_a_window_limits_attention():
    area = Core(1, 1, 1, 1, window=2).flops([4]) * 4 / 4  # 2 features, 2 FLOPs each, over 4 tokens
    assert area == (4 - 2) * 2 + 2 * 2 / 2
    assert Core(1, 1, 1, 1, window=9).flops([4]) == Core(1, 1, 1, 1).flops([4])
