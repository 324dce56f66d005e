"""Models beside the policy: whether they read the same token ids. Equal numbers of tokens do not say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from posttrain.data.rendering import Renderer
from posttrain.errors import ModelError


@contextmanager
def blamed_on(where: str) -> Iterator[None]:
    """What is wrong with a model inside the block is said of the key that names it, not of the policy's."""
    try:
        yield
    except ModelError as error:
        if error.where != "model.path":
            raise
        raise ModelError(error.what, where=where, hint=error.hint) from error


def check_same_vocabulary(policy: Renderer, other: PreTrainedTokenizerBase, where: str) -> None:
    """The ids of the policy's tokenizer mean the same to another model, and it knows where completions end.

    Rows of the embeddings beyond the tokenizer's ids are padding, of which the two may have different numbers.

    Args:
        policy: with the policy's tokenizer.
        other: the other model's.
        where: the key that names the other model.

    Raises:
        ModelError: an id stands for something else there, or a completion of the policy ends with no token that ends
            one there.
    """
    what = "the " + where.removesuffix(".path").rpartition(".")[2].replace("_", " ")
    own, theirs = (_strings(tokenizer) for tokenizer in (policy.tokenizer, other))
    differing = sorted(i for i in own if theirs.get(i) != own[i])
    if differing:
        first = differing[0]
        there = "nothing" if first not in theirs else repr(theirs[first])
        raise ModelError(
            f"{what} has another vocabulary than the policy: {len(differing):,} of {len(own):,} ids differ, the first "
            f"is {first}, which stands for {own[first]!r} here and for {there} there",
            where=where,
            hint="take a model with the policy's tokenizer; log-probs of other tokens cannot be compared",
        )
    ends = Renderer(other).stop_ids
    if not set(policy.stop_ids) & set(ends):
        here, there = (", ".join(repr(own.get(i, str(i))) for i in ids) for ids in (policy.stop_ids, ends))
        raise ModelError(
            f"completions of the policy end with {here}, those of {what} with {there}",
            where=where,
            hint="it would find every end unlikely: take a model with the policy's end tokens and chat template",
        )


def _strings(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}
