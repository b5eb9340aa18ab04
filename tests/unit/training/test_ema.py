"""The average of the weights: its formula, and that training does not notice it."""

import numpy as np
import paddle
from support.tiny_models import tiny_model

from erniekit.checkpoint.model_io import save_model
from erniekit.training.ema import DIRECTORY, WeightAverage


def test_the_average_follows_its_formula_and_the_weights_stay():
    model = tiny_model("moe")
    average = WeightAverage(model, decay=0.9)
    name, parameter = next(iter(model.named_parameters()))
    expected = parameter.numpy().astype(np.float64)
    for step in range(3):
        parameter.set_value(parameter.numpy() + np.float32(step + 1))
        own = parameter.numpy().copy()
        average.update()
        expected = 0.9 * expected + 0.1 * parameter.numpy()
        np.testing.assert_array_equal(parameter.numpy(), own)
    np.testing.assert_allclose(average.average[name].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_loaded_average_is_the_saved_one_and_the_weights_stay(tmp_path):
    model, other = tiny_model("moe"), tiny_model("moe", seed=5)
    save_model(other, tmp_path / DIRECTORY)
    average = WeightAverage(model, decay=0.9)
    before = {name: tensor.numpy() for name, tensor in model.named_parameters()}
    average.load(tmp_path)
    for name, tensor in other.named_parameters():
        np.testing.assert_array_equal(average.average[name].numpy(), tensor.numpy())
    for name, tensor in model.named_parameters():
        np.testing.assert_array_equal(tensor.numpy(), before[name])


def test_it_covers_router_biases_too():
    model = tiny_model("moe")
    average = WeightAverage(model, decay=0.5)
    name, bias = next((n, b) for n, b in model.named_buffers() if "correction_bias" in n)
    bias.set_value(paddle.ones(bias.shape))
    average.update()
    np.testing.assert_allclose(average.average[name].numpy(), 0.5)
