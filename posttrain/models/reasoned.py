"""What a reasoner (`companions.Reasoner`) is, and what it is asked about a problem.

Imports without torch, as `check` asks the same before anything is loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from posttrain.config.schema import ModelConfig, Recipe
from posttrain.data.encoding import unmarked
from posttrain.data.rendering import Renderer
from posttrain.data.revisions import revision
from posttrain.data.sample import Problem
from posttrain.methods.companions import Reasoner
from posttrain.models.vocabulary import blamed_on

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

WHERE = "method.reasoner"


def of_text(recipe: Recipe, wanted: Reasoner) -> ModelConfig:
    """How the reasoner is loaded: as the policy, but a model of text with the template of its own folder."""
    return recipe.model.of_folder(wanted.path).model_copy(update={"pictures": None, "chat_template": None})


def asks(
    wanted: Reasoner,
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    generation: GenerationConfig | None = None,
) -> Renderer:
    """What renders for the reasoner, tried with the prompt of a problem.

    Raises:
        ModelError: a tokenizer that cannot be used.
        DataError: the problem is a chat that the reasoner's tokenizer has no template for, or does not end with the
            user's message.
    """
    with blamed_on(WHERE):
        own = Renderer(tokenizer, generation_eos=None if generation is None else generation.eos_token_id)
        own.prompt_ids(question(problem, "seen", wanted.template))
    return own


def question(problem: Problem, description: str, template: str) -> Problem:
    """What the reasoner is asked: the prompt without its pictures, and the description."""
    prompt = problem.prompt
    if isinstance(prompt, str):
        seen = replace(problem, prompt=unmarked(prompt))
    else:
        seen = replace(problem, prompt=tuple({**each, "content": unmarked(each["content"])} for each in prompt))
    return revision(seen, description, template)
