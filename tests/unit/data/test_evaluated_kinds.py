"""Which metrics need evaluation data of their kind."""

import pytest
from support.data_runs import build, config, write

from erniekit.data.evaluated_kinds import require_metric
from erniekit.utils.errors import DataError

EVALUATED = {"stage": "KTO", "evaluation_strategy": "epoch", "do_eval": True, "eval_dataset_type": "erniekit"}


def judged(directory, *labels):
    return write(directory / "judged.jsonl", [{"src": str(n), "tgt": "yes", "label": x} for n, x in enumerate(labels)])


def require(path, metric, **more):
    keys = {**EVALUATED, "eval_dataset_path": str(path), "metric_for_best_model": metric, **more}
    with build(path, split="eval", **keys) as loader:
        require_metric(config(path, **keys), loader)


def test_a_metric_that_the_evaluation_data_cannot_give_is_refused(tmp_path):
    good = judged(tmp_path, True, True)
    with pytest.raises(DataError, match="metric_for_best_model: reward_bad: the evaluation data holds no bad answers"):
        require(good, "eval_reward_bad")
    with pytest.raises(DataError, match="margin: the evaluation data holds no bad answers"):
        require(good, "margin")
    require(good, "reward_good")
    require(good, "kl")
    require(good, "margin", evaluation_strategy="no")
    bad = judged(tmp_path, False)
    with pytest.raises(DataError, match="margin: the evaluation data holds no good answers"):
        require(bad, "margin")


def test_only_the_rows_that_are_evaluated_count(tmp_path):
    mixed = judged(tmp_path, True, False)
    require(mixed, "margin", packing=False)
    with pytest.raises(DataError, match="holds no bad answers"):
        require(mixed, "margin", packing=False, batch_size=1, max_evaluate_steps=1)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_loss_of_a_modality_needs_labels_of_it(tmp_path, kind):
    text = write(tmp_path / "text.jsonl", [{"src": "a", "tgt": "b"}])
    with pytest.raises(DataError, match=f"loss_{kind}: the evaluation data holds no labels of modality {kind}"):
        require(text, f"loss_{kind}", stage="SFT")
    require(text, "loss_text", stage="SFT")
