"""Episodes that are played between steps: how many the policy of now solves."""

from __future__ import annotations

from pathlib import Path

from posttrain.data.episodes import judge_episodes, write_episodes
from posttrain.data.sources import problems
from posttrain.data.turns import Turns
from posttrain.evaluation.episodes import summaries
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.episodes import EpisodeSampler, environment_seed
from posttrain.trainers.shell import RunParts


class PlayedEvaluation:
    """The problems of `evaluation.episodes`, played by the engine in the environments of the run.

    Seeds of environments and draws are the same each time, and none of the training's.

    Args:
        parts: of the run, with `environments` and `evaluation.episodes`.
    """

    def __init__(self, parts: RunParts) -> None:
        recipe = parts.recipe
        config, rollouts = recipe.evaluation.episodes, recipe.rollouts
        self.parts, self.seed = parts, recipe.evaluation.seed
        turns = Turns(parts.renderer, recipe.environment)
        self.sampler = EpisodeSampler(parts.engine, parts.environments, turns, recipe.environment)
        self.problems = parts.environments.equipped(problems(config.prompts, "evaluation.episodes"))
        self.sampling = Sampling(
            max_new_tokens=rollouts.max_new_tokens,
            temperature=rollouts.temperature,
            top_p=rollouts.top_p,
            top_k=rollouts.top_k,
            greedy=config.greedy,
            seed=self.seed,
        )

    def measure(self, path: Path) -> dict[str, float]:
        """Metrics of one episode of each problem; the episodes are written to `path`."""
        seeds = [environment_seed(self.seed, 0, number) for number in range(len(self.problems))]
        episodes = self.sampler.play(self.problems, seeds, self.sampling).episodes
        if self.parts.judge is not None:
            judge_episodes(self.parts.judge, episodes)
        path.parent.mkdir(exist_ok=True)
        write_episodes(path, episodes)
        found = summaries(episodes)[-1]
        solved = {"solved": found.solved.value, "solved_low": found.solved.low, "solved_high": found.solved.high}
        others = {"turns": found.turns, "invalid_action_share": found.invalid}
        others["unknown_share"] = found.unknown / len(episodes)
        return {f"eval/episodes/{name}": value for name, value in (solved | others).items()}
