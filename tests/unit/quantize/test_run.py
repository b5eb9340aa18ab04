"""The pass over a model's directory: results, resuming, experts with few tokens, pictures, memory."""

import resource
import tracemalloc
from collections import defaultdict

import numpy as np
import paddle
import pytest
from paddle.base import core
from support.tiny_models import tiny_model
from support.tiny_vision import CONFIG, packed_row

from erniekit.checkpoint.model_io import load_weights, save_model
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.checkpoint.quantised_codecs import PackQuantized
from erniekit.data.packed_batch import Document, make_row
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import batch_inputs
from erniekit.precision.codes import choose_scales, decode, encode, full_range
from erniekit.quantize import layer_pass
from erniekit.quantize import run as module
from erniekit.quantize.algorithm import AlgorithmOptions
from erniekit.quantize.layer_pass import LayerReport, to_bf16
from erniekit.quantize.places import EXPERTS
from erniekit.quantize.run import calibrate, peak_bytes
from erniekit.quantize.schemes import Scheme
from erniekit.quantize.store import LayerStore
from erniekit.utils.errors import CheckpointError

SPEC = full_range(4, group=16)
CODEC = PackQuantized(SPEC)
LAYERS = 3


def scheme(format="pt", experts_only=False):
    """4 bits in groups of 16, of all projections or those of experts."""

    def codec_of(logical, place):
        return CODEC if place.role in EXPERTS or not experts_only else None

    return Scheme("test", format, codec_of, {}, "", "")


def rows(count=6, length=40, seed=0):
    rng = np.random.default_rng(seed)
    return [
        make_row([Document(rng.integers(5, 61, length), np.full(length, -100))], [f"row:{number}"])
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(tiny_model("moe", num_hidden_layers=LAYERS, use_bias=True), path)
    return path


@pytest.fixture(scope="module")
def vision_directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("vision")
    paddle.seed(0)
    save_model(CausalLM(ModelConfig.from_dict(CONFIG)), path)
    return path


def quantised(directory, work, batches=None, of=None, **options):
    reader = ModelReader(directory)
    chosen = AlgorithmOptions(**options)
    return calibrate(reader.config, reader, batches or rows(), of or scheme(), chosen, work, {"model": "tiny"})


def all_codes(directory, result, of=None):
    config = ModelReader(directory).config
    return {matrix.name: result.codes(matrix) for matrix in (of or scheme()).every_matrix(config)}


def assembled(directory, result):
    """The model that a reader of the results has: codes times scales, folded weights, everything else as it was."""
    reader = ModelReader(directory)
    model = CausalLM(reader.config)
    values = defaultdict(list)
    for logical in reader.logicals:
        folded = result.folded(logical)
        matrices = scheme().matrices(logical)
        if matrices:
            parts = [decode(*result.codes(matrix), SPEC) for matrix in matrices]
            values[logical.param].append(logical.from_file(parts, "pt"))
        else:
            values[logical.param].append(reader.read(logical, as_fp32=True) if folded is None else folded)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in values:
            tensor.set_value(np.stack(values[name]) if len(tensor.shape) == 3 else values[name][0])
    model.eval()
    return model


def last_hidden(model, batches):
    with paddle.no_grad():
        return np.concatenate([model.model(batch_inputs(model, batch)).last.numpy() for batch in batches])


def plain(directory):
    model = CausalLM(ModelReader(directory).config)
    load_weights(model, directory)
    model.eval()
    return model


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "smoothquant"])
def test_results_are_the_model_that_was_calibrated(directory, tmp_path, algorithm):
    """The pass ends with the outputs of the model that its results describe: fp32, sums of other lengths."""
    result = quantised(directory, tmp_path / "work", algorithm=algorithm)
    hidden = np.load(tmp_path / "work" / f"layer-{LAYERS - 1:05d}" / "hidden.npy")
    model = assembled(directory, result)
    np.testing.assert_allclose(last_hidden(model, rows()), hidden, rtol=1e-4, atol=1e-4 * np.abs(hidden).max())
    gain = model.model.layers[1].input_layernorm.weight.numpy()
    assert algorithm == "gptq" or np.array_equal(gain, to_bf16(gain))
    result.finish()
    assert not (tmp_path / "work").exists()


def test_gptq_has_less_error_than_rounding(directory, tmp_path):
    """In the outputs of the whole model, on the calibration tokens and on others."""
    result = quantised(directory, tmp_path / "a")
    rounded = quantised(directory, tmp_path / "b", algorithm="rtn")
    for batches in (rows(), rows(seed=1)):
        exact = last_hidden(plain(directory), batches)
        outputs = [last_hidden(assembled(directory, each), batches) for each in (result, rounded)]
        errors = [np.linalg.norm(output - exact) for output in outputs]
        assert errors[0] < 0.9 * errors[1]
    for name, (codes, scales) in all_codes(directory, rounded).items():
        weight = ModelReader(directory).reader.read(f"{name}.weight")
        np.testing.assert_array_equal(codes, encode(weight, choose_scales(weight, SPEC), SPEC))
        np.testing.assert_array_equal(scales, choose_scales(weight, SPEC))


def test_same_arguments_same_bytes_and_an_interrupted_run_continues(directory, tmp_path, monkeypatch, caplog):
    expected = all_codes(directory, quantised(directory, tmp_path / "whole"))
    run, opened = layer_pass.LayerPass.run, []

    def killed(self, number):
        opened.append(number)
        if number == 2 and opened.count(2) == 1:
            raise KeyboardInterrupt
        return run(self, number)

    monkeypatch.setattr(module.LayerPass, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        quantised(directory, tmp_path / "work")
    result = quantised(directory, tmp_path / "work")
    assert opened == [0, 1, 2, 2] and len(result.reports) == LAYERS
    for name, (codes, scales) in all_codes(directory, result).items():
        np.testing.assert_array_equal(codes, expected[name][0])
        np.testing.assert_array_equal(scales, expected[name][1])
    lines = []
    monkeypatch.setattr(module.LayerStore.__init__.__globals__["log"], "warning", lines.append)
    quantised(directory, tmp_path / "work", damping=0.02)
    assert opened[4:] == [0, 1, 2] and "other settings (option damping)" in lines[0]


def test_layouts_have_the_same_weights(directory, tmp_path):
    """-Paddle has fused tensors; without groups that span parts both layouts decode to the same model."""
    pt, fused = (
        all_codes(directory, quantised(directory, tmp_path / each, of=scheme(each)), scheme(each))
        for each in ("pt", "paddle")
    )
    codes = fused["ernie.layers.1.self_attn.qkv_proj"][0]
    parts = [pt[f"model.layers.1.self_attn.{part}_proj"][0] for part in "qkv"]
    np.testing.assert_array_equal(codes, np.concatenate(parts))


def test_tokens_of_experts(directory, tmp_path):
    """As many as the unquantised model's routers send there: only experts are quantised, and layer 1 is the first with
    any.
    """
    batches = rows()
    model = plain(directory)
    usage = np.zeros(4, int)
    for batch in batches:
        with paddle.no_grad():
            usage += model.model(batch_inputs(model, batch)).routings[1, 0].usage
    report = quantised(directory, tmp_path / "work", batches, scheme(experts_only=True)).reports[1]
    assert report.expert_tokens == {0: usage.tolist()}
    tokens = {matrix.name: matrix.tokens for matrix in report.matrices}
    assert [tokens[f"model.layers.1.mlp.experts.{e}.down_proj"] for e in range(4)] == usage.tolist()


def test_experts_with_few_tokens_are_named(directory, tmp_path, monkeypatch):
    """9 tokens, 2 of 4 experts each: some have fewer than 32 / 4."""
    lines = []
    monkeypatch.setattr(layer_pass.log, "warning", lines.append)
    report = quantised(directory, tmp_path / "a", rows(1, 9)).reports[1]
    few = {int(matrix.name.split(".")[5]) for matrix in report.matrices if "blended" in matrix.note}
    assert few == {expert for expert, count in enumerate(report.expert_tokens[0]) if count < 8}
    assert any(f"{len(few)} of 4 experts with fewer than 8 calibration tokens" in line for line in lines)
    report = quantised(directory, tmp_path / "b", rows(1, 9), all_experts=True).reports[1]
    assert not any(matrix.note for matrix in report.matrices)


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_pictures(vision_directory, tmp_path, algorithm, monkeypatch):
    """Experts of both modalities get their own tokens, and the routers of both are folded with the gain."""
    lines = []
    monkeypatch.setattr(layer_pass.log, "warning", lines.append)
    batches = [packed_row([[30, (1, 8, 12), 20], [(4, 8, 8), 12]], seed) for seed in range(3)]
    result = quantised(vision_directory, tmp_path / "work", batches, algorithm=algorithm)
    tokens = result.reports[3].expert_tokens
    is_vision = np.concatenate([batch.modality != 0 for batch in batches])
    assert [sum(tokens[modality]) for modality in (0, 1)] == [2 * (~is_vision).sum(), 2 * is_vision.sum()]
    hidden = np.load(tmp_path / "work" / "layer-00003" / "hidden.npy")
    again = last_hidden(assembled(vision_directory, result), batches)
    np.testing.assert_allclose(again, hidden, rtol=1e-3, atol=1e-4 * np.abs(hidden).max())
    gate = next(each for each in ModelReader(vision_directory).logicals if each.param.endswith("3.mlp.gate.weight_1"))
    assert (result.folded(gate) is not None) == (algorithm == "awq")
    text = quantised(vision_directory, tmp_path / "text", rows(2, 40), algorithm=algorithm)
    assert any("no calibration token reaches the vision experts" in line for line in lines)
    assert any("vision" not in m.name and m.note == "rtn: no calibration token" for m in text.reports[3].matrices)


@pytest.mark.slow
def test_memory_is_that_of_one_layer(tmp_path):
    """Five layers of 1.3 MB: the peak stays below the formula's, which is far from the whole model's size. numpy's and
    Paddle's peaks are added, although they need not be at the same time; 0.5 MB are Python's objects.
    """
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "moe_num_experts": 4, "intermediate_size": 128}
    model = tiny_model("moe", num_hidden_layers=5, moe_layer_start_index=0, **sizes)
    save_model(model, tmp_path / "model")
    total = 4 * sum(int(np.prod(parameter.shape)) for parameter in model.parameters())
    bound = peak_bytes(model.config, AlgorithmOptions(), 40)
    del model
    quantised(tmp_path / "model", tmp_path / "first", rows(1))  # what is imported on first use
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    tracemalloc.start()
    quantised(tmp_path / "model", tmp_path / "work", rows(1))
    peak = tracemalloc.get_traced_memory()[1] + core.host_memory_stat_peak_value("Allocated", 0) - before
    tracemalloc.stop()
    assert peak < bound + 0.5e6 < 0.6 * total, (peak, bound, total)


@pytest.mark.parametrize(
    ("param", "bad", "message"),
    [
        ("model.layers.1.self_attn.o_proj.weight", np.nan, r"layer 1 cannot be quantised: .*o_proj"),
        ("model.layers.1.self_attn.o_proj.weight", 1e30, r"o_proj: its weights or its outputs are too large for fp32"),
        ("model.embed_tokens.weight", np.nan, r"embed_tokens.weight: the embeddings of the calibration tokens are not"),
    ],
)
def test_a_weight_that_is_not_finite_or_too_large_is_named(directory, tmp_path, param, bad, message):
    reader = ModelReader(directory)

    class Damaged:
        logicals = reader.logicals

        def read(self, logical, as_fp32=False):
            value = reader.read(logical, as_fp32)
            if logical.param == param:
                value[:, 3] = bad
            return value

    with pytest.raises(CheckpointError, match=message):
        calibrate(reader.config, Damaged(), rows(), scheme(), AlgorithmOptions(), tmp_path / "work", {})


def test_a_write_that_fails_has_its_number(tmp_path):
    """By which a full disk is recognised. Here the system refuses files of more than 2000 bytes."""
    store = LayerStore(tmp_path, {})
    (tmp_path / "layer-00000").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            store.finish(LayerReport(0, [], {}, []), np.zeros((100, 100), np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_finished_layer_that_is_damaged(directory, tmp_path):
    result = quantised(directory, tmp_path / "work")
    file = tmp_path / "work" / "layer-00000" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"Remove .*work to begin the quantisation again"):
        all_codes(directory, result)


def test_too_few_tokens_for_gptq_are_a_warning(directory, tmp_path, caplog):
    quantised(directory, tmp_path / "few", batches=rows(1, 20))
    assert "20 tokens for matrices of up to" in caplog.text
    caplog.clear()
    quantised(directory, tmp_path / "rounded", batches=rows(1, 20), algorithm="rtn")
    assert "tokens for matrices" not in caplog.text
