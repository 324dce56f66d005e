"""`posttrain play`: episodes of a recipe's environment, by its policy, a scripted agent or a person."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from posttrain.cli.tables import print_table
from posttrain.config.loading import load_recipe
from posttrain.config.schema import Recipe
from posttrain.data.encoding import readable
from posttrain.data.episodes import Episode, read_episodes, write_episodes
from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.recorded import Recorded
from posttrain.errors import NeedsError, PosttrainError, RecipeError
from posttrain.evaluation.episodes import Summary, play, sop, summaries
from posttrain.methods import CONFIGS, METHODS
from posttrain.rollouts.episodes import replayed
from posttrain.terminal import say
from posttrain.trainers.rows import refuse


def play_command(
    path: Path, overrides: list[str], agent: str, episodes: int, *, samples: int = 1, greedy: bool, out: Path | None
) -> None:
    """Play, write and report.

    Args:
        path, overrides: of the recipe.
        agent: who acts.
        episodes: how many problems.
        samples: episodes of each.
        greedy: take the likeliest tokens; policy only.
        out: file for the episodes.

    Raises:
        PosttrainError: as for training; an agent that the environment does not have.
    """
    recipe = _recipe(path, overrides)
    if greedy and agent != "policy":
        raise RecipeError("--greedy has no effect: only the policy draws tokens")
    if greedy and samples > 1:
        raise RecipeError("--greedy episodes of one problem are all alike", hint="leave out --samples")
    own = {"person": lambda seed: _Person()}
    played = play(recipe, agent, episodes, samples=samples, greedy=greedy, further=own).episodes
    if out is not None:
        write_episodes(out, played)
        say(f"{len(played):,} episodes in {out}")
    _show(played[-1])
    _report(summaries(played))
    if isinstance(recipe.environment, Recorded.Config) and recipe.environment.patches == 0:
        progress, solved, score = sop(recipe.environment, played)
        say(f"\nalong the recorded episodes: progress {progress:.3f}, without an error {solved:.3f}, score {score:.3f}")


def again_command(path: Path, overrides: list[str], file: Path) -> None:
    """Play the actions of a file again and say what differs.

    Raises:
        WorldError: an environment answers otherwise than it did.
    """
    recipe, episodes = _recipe(path, overrides), list(read_episodes(file))
    with closing(EnvironmentPool(recipe.environment)) as pool:
        differences = replayed(pool, episodes)
    wrong = [(episode, found) for episode, found in zip(episodes, differences, strict=True) if found is not None]
    for episode, found in wrong[:10]:
        say(f"{episode.problem.id}, {found}")
    if wrong:
        raise PosttrainError(f"{len(wrong)} of {len(episodes)} episodes went otherwise", where=str(file))
    say(f"{len(episodes):,} episodes went as they did before")


def _recipe(path: Path, overrides: list[str]) -> Recipe:
    recipe = load_recipe(path, overrides, CONFIGS)
    if recipe.environment is None:
        raise NeedsError("the recipe has no environment to play in", where=str(path), hint="add `environment`")
    refuse(recipe, METHODS[recipe.method.name](recipe.method))
    return recipe


class _Person:
    """Asks who sits at the terminal."""

    def act(self, observation: str) -> str:
        say(readable(observation))
        say("> ", nl=False)
        return input()


def _show(episode: Episode) -> None:
    say(f"\n{episode.problem.id}, the last of them", bold=True)
    for message in episode.prompt:
        say(f"  {message['role']}: {readable(message['content'])}")
    for turn in episode.turns:
        say(f"  > {turn.action}", fg="green")
        if turn.step is not None:
            reward = f"  (reward {turn.step.reward:g})" if turn.step.reward else ""
            say(f"    {readable(turn.step.observation)}{reward}")
    say(f"  {episode.stop}{': ' if episode.detail else ''}{episode.detail}, return {episode.total:g}")


def _report(found: list[Summary]) -> None:
    header = ("level", "episodes", "solved", "95%", "reward", "turns", "tokens", "invalid", "ended")
    print_table([_cells(one) for one in found], "episodes", header)
    if any(one.unknown for one in found):
        say("\nepisodes that nobody could judge count as not solved; the reward is that of the others")


def _cells(one: Summary) -> tuple[str, ...]:
    ended = ", ".join(f"{stop} {number}" for stop, number in one.stops.items())
    interval = f"{one.solved.low:.3f} to {one.solved.high:.3f}"
    numbers = (f"{one.total:.3f}", f"{one.turns:.1f}", f"{one.action_tokens:.1f}", f"{one.invalid:.1%}")
    return (one.group, str(one.episodes), f"{one.solved.value:.3f}", interval, *numbers, ended)
