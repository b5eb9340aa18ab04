"""The pass over a model's directory, one layer in memory."""

import dataclasses

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model

from erniekit.checkpoint.model_io import save_model
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.data.packed_batch import Document, make_row
from erniekit.models.weights import logical_tensors
from erniekit.precision.codes import decode, full_range
from erniekit.quantize import run as module
from erniekit.quantize.options import Options
from erniekit.quantize.run import Target, calibrate, layer_number

SPEC = full_range(4, group=16)
BASE = {"hidden_size": 32, "moe_num_experts": 4}


def spec_of(logical, piece):
    """All projections of the decoder layers."""
    return SPEC if len(logical.shape) == 2 and not logical.keep_fp32 and layer_number(logical) is not None else None


def rows(count=4, length=40, vocabulary=61, seed=0):
    rng = np.random.default_rng(seed)
    return [
        make_row([Document(rng.integers(5, vocabulary, length), np.full(length, -100))], [f"row:{number}"])
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(tiny_model("moe", num_hidden_layers=3), path)
    return path


def quantised(directory, work, batches=None, **options):
    reader = ModelReader(directory)
    target = Target("pt", spec_of)
    return calibrate(reader.config, reader, batches or rows(), target, Options(**options), work, {"model": "tiny"})


def all_codes(directory, result):
    return {
        piece.name: result.codes(logical, piece)
        for logical in ModelReader(directory).logicals
        for piece in logical.pt
        if spec_of(logical, piece)
    }


def test_thin(directory, tmp_path):
    for algorithm in ("gptq", "awq", "smoothquant"):
        result = quantised(directory, tmp_path / algorithm, algorithm=algorithm)
        print(algorithm, [(m.name, round(m.rms, 3), m.output_error, m.tokens, m.note) for m in result.reports[1].matrices][:9], result.reports[1].expert_tokens)
