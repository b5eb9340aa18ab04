"""The method table: the only module that defines what each method computes.

config/methods.py has the facts about each method that configuration and data need. A row here adds the computation: the
recipe (the loss of a step), the evaluator, and whether there is a reference.

To add a method, write:

1. a row of facts in config/methods.py: its name, the records that it reads, the group of its options (in a new
   schema_*.py if it has new keys), and the keys that it does not read;
2. a recipe in training/recipes/, a subclass of `Recipe` with `counts` and `head_terms`;
3. a row here, with an evaluator of training/evaluators.py, or a new one there if it reports something else.

New kinds of records also need a reader in data/records/. No other code tests for the method: neither its name nor
`stage` occurs anywhere else (tests/test_methods.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from erniekit.build import PreparedModel
from erniekit.config.methods import METHODS as FACTS
from erniekit.config.methods import MethodFacts
from erniekit.config.schema import Config
from erniekit.config.schema_preference import wants_reference
from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.data.loader import StepSource
from erniekit.parallel.mesh import ParallelDims
from erniekit.training.data import DataContext, open_evaluation_rows, open_rows
from erniekit.training.evaluators import EvaluatedModel, EvaluationData, Evaluator, Scores, label_scores, pair_scores
from erniekit.training.judged_evaluator import judged_scores
from erniekit.training.recipes.base import Recipe, RecipeContext
from erniekit.training.recipes.distilled import causal_recipe
from erniekit.training.recipes.kto import KtoRecipe
from erniekit.training.recipes.preference import PreferenceRecipe
from erniekit.training.recipes.reward_model import RewardModelRecipe, reward_model_scores


def _no_reference(cfg: Config) -> bool:
    return False


def _has_reference(cfg: Config) -> bool:
    return True


def _nothing_to_check(cfg: Config, prepared: PreparedModel, tokenizer: Tokenizer, degrees: ParallelDims) -> None:
    return


# What generates (models of rewards, conversations, decoding) is imported by the runs that do: it takes a tenth of a
# second.


def _policy_recipe(context: RecipeContext) -> Recipe:
    from erniekit.training.recipes.policy import PolicyRecipe

    return PolicyRecipe.build(context)


def _open_prompts(context: DataContext) -> StepSource:
    from erniekit.training.rl.loader import open_prompts

    return open_prompts(context)


def _open_evaluation_prompts(context: DataContext) -> EvaluationData:
    from erniekit.training.rl.evaluate import open_evaluation_prompts

    return open_evaluation_prompts(context)


def _reward_scores(evaluated: EvaluatedModel, data: Any) -> Scores:
    from erniekit.training.rl.evaluate import reward_scores

    return reward_scores(evaluated, data)


def _gkd_recipe(context: RecipeContext) -> Recipe:
    from erniekit.training.recipes.gkd import GkdRecipe

    return GkdRecipe.build(context)


def _require_teacher(cfg: Config, prepared: PreparedModel, tokenizer: Tokenizer, degrees: ParallelDims) -> None:
    from erniekit.training.recipes.gkd import require_teacher

    require_teacher(cfg, prepared, tokenizer, degrees)


@dataclass(frozen=True)
class Method:
    """A method. `wants_reference`: whether the loss of a configuration compares with another model. `open_data`,
    `open_evaluation_data`: open what it trains on, and what it is evaluated on, before a weight is read. `check`, which
    is called before that too, raises a UserError for what the method needs beside model and data and does not find.
    """

    facts: MethodFacts
    build_recipe: Callable[[RecipeContext], Recipe]
    evaluator: Evaluator
    wants_reference: Callable[[Config], bool] = _no_reference
    check: Callable[[Config, PreparedModel, Tokenizer, ParallelDims], None] = _nothing_to_check
    open_data: Callable[[DataContext], StepSource] = open_rows
    open_evaluation_data: Callable[[DataContext], EvaluationData] = open_evaluation_rows


METHODS: dict[str, Method] = {
    method.facts.name: method
    for method in (
        Method(FACTS["SFT"], causal_recipe, label_scores),
        Method(FACTS["PT"], causal_recipe, label_scores),
        Method(FACTS["VL-SFT"], causal_recipe, label_scores),
        Method(FACTS["VL-PT"], causal_recipe, label_scores),
        Method(FACTS["DPO"], PreferenceRecipe.build, pair_scores, wants_reference),
        Method(FACTS["RM"], RewardModelRecipe.build, reward_model_scores),
        Method(
            FACTS["RL"],
            _policy_recipe,
            _reward_scores,
            open_data=_open_prompts,
            open_evaluation_data=_open_evaluation_prompts,
        ),
        Method(
            FACTS["VL-RL"],
            _policy_recipe,
            _reward_scores,
            open_data=_open_prompts,
            open_evaluation_data=_open_evaluation_prompts,
        ),
        Method(FACTS["VL-DPO"], PreferenceRecipe.build, pair_scores, wants_reference),
        Method(FACTS["KTO"], KtoRecipe.build, judged_scores, _has_reference),
        Method(FACTS["GKD"], _gkd_recipe, label_scores, check=_require_teacher),
    )
}


def method_of(cfg: Config) -> Method:
    """The method that a configuration names, which `config.support.require_supported` has found built."""
    return METHODS[cfg.method.name]
