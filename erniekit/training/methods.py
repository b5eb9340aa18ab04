"""The methods that can be run: the only module that knows what each of them computes.

A row adds to the facts of config/methods.py, which configuration and data need, what computes: the recipe (what the
loss of a step is), the evaluator, and whether there is a reference.

How a method is added:

1. a row of facts in config/methods.py: its name, what records it reads, the group of its options (a schema_*.py of its
   own if it has new keys), and the keys that it leaves unread;
2. a recipe in training/recipes/, a subclass of `Recipe` with `counts` and `head_terms`;
3. a row here, with an evaluator of training/evaluators.py, or a new one there if it reports something else.

New kinds of records need a reader in data/records/, too. Nothing else asks for the method: neither its name nor `stage`
occurs anywhere else (tests/test_methods.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

from erniekit.config.methods import METHODS as FACTS
from erniekit.config.methods import MethodFacts
from erniekit.config.schema import Config
from erniekit.losses.preference import wants_reference
from erniekit.training.evaluators import Evaluator, label_scores, pair_scores
from erniekit.training.recipes.base import Recipe, RecipeContext
from erniekit.training.recipes.causal import CausalRecipe
from erniekit.training.recipes.preference import PreferenceRecipe


def _no_reference(cfg: Config) -> bool:
    return False


@dataclass(frozen=True)
class Method:
    """A method. `wants_reference`: whether the loss that a configuration asks for compares with another model."""

    facts: MethodFacts
    build_recipe: Callable[[RecipeContext], Recipe]
    evaluator: Evaluator
    wants_reference: Callable[[Config], bool] = _no_reference


METHODS: dict[str, Method] = {
    method.facts.name: method
    for method in (
        Method(FACTS["SFT"], CausalRecipe.build, label_scores),
        Method(FACTS["PT"], CausalRecipe.build, label_scores),
        Method(FACTS["VL-SFT"], CausalRecipe.build, label_scores),
        Method(FACTS["DPO"], PreferenceRecipe.build, pair_scores, wants_reference),
    )
}


def method_of(cfg: Config) -> Method:
    """The method that a configuration names, which `config.support.require_supported` has found built."""
    return METHODS[cfg.method.name]
