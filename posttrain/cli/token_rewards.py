"""`posttrain inspect --token-rewards`: what a DPO policy rewards, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from posttrain.cli.tables import print_table
from posttrain.config.loading import load_recipe, parse_config
from posttrain.config.relative_paths import from_folder, started_in
from posttrain.config.schema import FileSource, ModelConfig
from posttrain.data.rendering import Renderer
from posttrain.errors import RecipeError
from posttrain.evaluation.token_rewards import TokenRewards, read_responses, token_rewards, write_token_rewards
from posttrain.methods import CONFIGS
from posttrain.models.tokenizer import load_tokenizer
from posttrain.safe_files import refuse_links_out
from posttrain.terminal import say


@dataclass(frozen=True, slots=True)
class _Trained:
    """A policy, what it was trained from, the beta of its training, and how its pairs were read."""

    policy: str
    reference: str
    beta: float
    source: FileSource | None


def token_rewards_command(
    paths: list[Path],
    target: str,
    reference: str | None,
    beta: float | None,
    limit: int | None,
    output: Path | None,
    plot: Path | None,
    plain: bool,
    dtype: str,
) -> None:
    """Score the tokens of traces or pairs, print a line per response, write JSON lines and a picture if asked for.

    Raises:
        RecipeError: no reference or beta is known, or another dtype.
        DataError, ModelError: as `evaluation.token_rewards`.
    """
    trained = _trained(target, reference, beta)
    policy = parse_config({"path": trained.policy, "dtype": dtype}, ModelConfig)
    renderer = Renderer(load_tokenizer(policy))
    source = trained.source or FileSource(path="")
    if plain:
        source = source.model_copy(update={"chat": False})
    responses = [
        response
        for path in paths
        for response in read_responses(path, renderer, source.model_copy(update={"path": str(path)}))
    ][:limit]
    found = token_rewards(trained.policy, trained.reference, trained.beta, responses, renderer, dtype)
    title = f"{trained.policy} against {trained.reference}, beta {trained.beta:g}"
    print_table([_row(each) for each in found], title, header=("id", "role", "tokens", "reward", "highest", "lowest"))
    if output is not None:
        write_token_rewards(output, found)
        say(f"{output}: rewards of {sum(len(each.ids) for each in found):,} tokens")
    if plot is not None:
        from posttrain.tracking.heat_strip import Strip, draw_strips

        strips = [
            # Of an id that holds the path of a file, the file's name says enough.
            Strip(f"{'/'.join(each.id.split('/')[-2:])}  {each.role}  {each.reward:+.3f}", each.pieces, each.rewards)
            for each in found
        ]
        say(f"{draw_strips(strips, 'beta (log policy - log reference), per token', plot)}: coloured tokens")


def _trained(target: str, reference: str | None, beta: float | None) -> _Trained:
    """What the options say, and a run folder's recipe where they do not."""
    resolved, source = Path(target) / "resolved.yaml", None
    if resolved.is_file():
        refuse_links_out(Path(target))
        recipe = load_recipe(resolved, [], CONFIGS, run_plugins=False)
        recipe = from_folder(recipe, started_in(Path(target)))
        source = recipe.data.preferences if isinstance(recipe.data.preferences, FileSource) else None
        reference = reference or recipe.model.path
        beta = getattr(recipe.method, "beta", None) if beta is None else beta
        target = str(Path(target) / "model")
    if reference is None:
        raise RecipeError("no reference: the model that the policy was trained from", hint="give --reference MODEL")
    if beta is None:
        raise RecipeError("no beta: the one of the policy's training", hint="give --beta, e.g. --beta 0.1")
    return _Trained(target, reference, beta, source)


def _row(each: TokenRewards) -> tuple[str, str, str, str, str, str]:
    def token(place: int) -> str:
        return f"{each.pieces[place]!r} {each.rewards[place]:+.3f}"

    places = range(len(each.ids))
    high, low = max(places, key=each.rewards.__getitem__), min(places, key=each.rewards.__getitem__)
    return each.id, each.role, str(len(each.ids)), f"{each.reward:+.3f}", token(high), token(low)
