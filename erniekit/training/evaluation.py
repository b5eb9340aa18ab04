"""Evaluates the model during training, over every rank's shard of model and data."""

from erniekit.training.build import Run
from erniekit.training.evaluators import EvaluatedModel, score

_CURE = (
    "No checkpoint that was saved before is harmed. Lower learning_rate, add warmup_steps, or look for extreme samples "
    "in the evaluation data."
)


def evaluate(run: Run, step: int = 0) -> dict[str, float]:
    """The metrics of the run's method over the evaluation data, as `erniekit eval` reports them of the same weights.
    The names begin with eval_. `step`: the optimizer steps that are done, for messages.
    """
    assert run.eval_loader is not None
    evaluated = EvaluatedModel(f"after step {step}", run.cfg, run.model, run.recipe.reference)
    scores = score(run.method.evaluator, evaluated, run.eval_loader, _CURE)
    return {f"eval_{name}": value for name, value in scores.metrics.items()}
