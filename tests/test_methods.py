"""The table of methods is the only place that knows them, and a row is all that a new one needs."""

import ast
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
import pytest
from support import equality
from support.source_tree import REPOSITORY, Module, read_package

from erniekit import config
from erniekit.config.evaluation_metrics import metrics_of
from erniekit.config.methods import METHODS as FACTS
from erniekit.config.methods import MethodFacts, Records
from erniekit.data.loader import Loader
from erniekit.data.packed_batch import Modality, PackedBatch
from erniekit.losses import preference, reward_model
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.models.scoring import Score
from erniekit.parallel.mesh import Mesh
from erniekit.training.build import build_run
from erniekit.training.callbacks import Callback, StepMetrics
from erniekit.training.evaluators import EvaluatedModel, Scores, batch_groups
from erniekit.training.forward_pass import forward_pass
from erniekit.training.judged_evaluator import _metrics
from erniekit.training.methods import METHODS, Method
from erniekit.training.recipes.base import Recipe, RecipeContext, Term
from erniekit.training.trainer import Trainer

TABLES = {"erniekit/config/methods.py", "erniekit/training/methods.py"}
THE_PROPERTY = ("erniekit/config/schema.py", "method")  # Config.method: the one look into the table


# The planner's `.stage` is the number of a pipeline stage.
PIPELINE_STAGES = ("erniekit/plan/", "erniekit/training/fit_check.py")


def questions(module: Module) -> list[str]:
    """A line for each place that asks which method a configuration names: for `.stage` of anything, and for the name of
    a method in a comparison, a lookup or a collection.
    """
    if module.shown in TABLES:
        return []
    found = []
    allowed = {
        node
        for function in ast.walk(module.tree)
        if isinstance(function, ast.FunctionDef) and (module.shown, function.name) == THE_PROPERTY
        for node in ast.walk(function)
    }
    for node in ast.walk(module.tree):
        is_key = not module.shown.startswith(PIPELINE_STAGES)  # elsewhere `.stage` is the configuration's key
        if isinstance(node, ast.Attribute) and node.attr == "stage" and node not in allowed and is_key:
            found.append(f"{module.shown}:{node.lineno}: reads .stage")
        # A method's own name occurs in prose and as a word that another tool's key stands for, and nowhere else.
        operands: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            operands = [node.slice]
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            operands = node.elts
        elif isinstance(node, ast.Dict):
            operands = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        for operand in operands:
            if isinstance(operand, ast.Constant) and operand.value in FACTS:
                found.append(f"{module.shown}:{operand.lineno}: asks for the method {operand.value}")
    return found


def test_nobody_but_the_table_asks_for_the_method():
    found = [line for module in read_package(REPOSITORY).values() for line in questions(module)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        'def f(cfg):\n    return cfg.stage == "DPO"',
        "def f(cfg):\n    return {}.get(cfg.stage)",
        'def f(values):\n    return values.get("stage") in ("VL-SFT", "DPO")',
        'def f(cfg):\n    return cfg.method.name != "SFT"',
        'TABLE = {"PT": 1}',
        'def f(name):\n    match name:\n        case "DPO":\n            return 1',
    ],
)
def test_a_question_is_found(tmp_path: Path, source: str):
    assert questions(Module("erniekit.x", tmp_path / "x.py", "erniekit/x.py", source, ast.parse(source)))


def test_every_method_that_is_built_has_a_row_of_both_kinds():
    assert METHODS.keys() == {name for name, facts in FACTS.items() if not facts.later}
    assert all(method.facts is FACTS[name] for name, method in METHODS.items())


# --- a made-up method: the mean squared length of hidden states


@dataclass(frozen=True)
class ShortStates(Recipe):
    """Pulls the hidden states towards zero."""

    weight: float

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        return {"states": float(batch.num_tokens), "tokens": float(batch.num_tokens)}

    def head_terms(
        self, model: CausalLM, x_TD: paddle.Tensor, inputs: ModelInputs, batch: PackedBatch
    ) -> dict[str, Term]:
        return {"length": Term(x_TD.square().sum(), "states", self.weight)}


def length_scores(evaluated: EvaluatedModel, loader: Loader) -> Scores:
    lengths = []
    for microbatches in batch_groups(evaluated, loader):
        forward_pass(
            evaluated.model, microbatches, lambda number, x_TD, inputs: lengths.append(float(x_TD.square().mean()))
        )
    return Scores({"loss": sum(lengths) / len(lengths)}, {"num_samples": len(lengths)})


class Heard(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.evaluations: list[dict[str, float]] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.losses.append(metrics.loss)

    def on_evaluate(self, step: int, metrics: dict[str, float]) -> None:
        self.evaluations.append(metrics)


def test_a_new_row_trains_evaluates_saves_and_resumes(tmp_path: Path):
    """By the product's trainer, from facts, a recipe and an evaluator."""
    built = []

    def build(context: RecipeContext) -> Recipe:
        built.append(context)
        return ShortStates(weight=0.5)

    facts = MethodFacts("SHORT", "short states", Records.CONVERSATIONS)
    method = Method(facts, build, length_scores)
    equality.prepare(tmp_path)
    keys = equality.keys_for(str(tmp_path), "dense", rows=4, learning_rate=1e-2)
    keys |= {"do_eval": True, "evaluation_strategy": "steps", "eval_steps": 1, "save_steps": 2}
    keys |= {"eval_dataset_path": f"{tmp_path}/train.jsonl", "eval_dataset_type": "erniekit", "max_evaluate_steps": 2}

    def train(max_steps: int) -> Heard:
        heard = Heard()
        run = build_run(config.load(None, keys | {"max_steps": max_steps}, "train"), Mesh.single(), method)
        Trainer(run, [heard]).fit()
        return heard

    heard = train(4)
    assert len(heard.losses) == 4 and heard.losses[-1] < heard.losses[0]
    values = [metrics["eval_loss"] for metrics in heard.evaluations]
    assert len(values) == 4 and values == sorted(values, reverse=True) and values[0] > 0
    more = train(6)
    assert len(more.losses) == 2 and more.losses[0] < heard.losses[-1]
    assert built[0].model is not built[1].model and built[0].cfg.output_dir == keys["output_dir"]


def test_the_metrics_of_the_table_are_those_of_the_evaluations():
    judged = _metrics(config.Config(stage="KTO"), np.array([1.0, -1.0]), np.array([True, False]), 0.0)
    of_labels = set(Score(1.0, 1, 1).metrics())
    of_pictures = of_labels | {f"loss_{modality.name.lower()}" for modality in Modality}
    wanted = [
        (("SFT", "PT", "GKD"), of_labels),
        (("VL-SFT", "VL-PT"), of_pictures),
        (("DPO", "VL-DPO"), {"loss", *preference.METRICS}),
        (("RM",), {"loss", *reward_model.METRICS}),
        (("KTO",), set(judged)),
    ]
    for names, metrics in wanted:
        assert all(set(FACTS[name].metrics) == metrics for name in names)
    assert all(facts.metric in facts.metrics for facts in FACTS.values())
    other = config.Config(stage="KTO", kto_loss_type="apo_zero_unpaired")
    assert list(_metrics(other, np.array([1.0, -1.0]), np.array([True, False]), 0.0)) == metrics_of(other)
