"""Games of TextWorld as an environment, for recipes/agents/grpo-textworld.yaml: one for each problem, made when it is
first asked for."""

import shutil
import tempfile
from pathlib import Path

from posttrain.environments.base import ActionError, Step


class Game:
    """One game. The return is the share of its points that the policy has won.

    Args:
        folder: where games are kept.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def reset(self, problem, seed):
        """What the game says first. It draws nothing: the columns `rooms`, `objects`, `quest` and `game` make it."""
        import textworld

        wanted = textworld.EnvInfos(
            objective=True, description=True, max_score=True, won=True, admissible_commands=True
        )
        self.game = textworld.start(str(made(self.folder, **problem.meta)), wanted)
        self.state, self.score = self.game.reset(), 0
        return f"{self.state.objective}\n\n{said(self.state.description)}"

    def step(self, action):
        """Do a command. One that the game does not offer here is answered with those that it does."""
        command = action.strip().lower()
        offered = self.state.admissible_commands
        if command not in offered:
            raise ActionError(f"say one of: {', '.join(sorted(offered))}")
        self.state, score, done = self.game.step(command)
        reward, self.score = (score - self.score) / self.state.max_score, score
        return Step(said(self.state.feedback), reward, done, success=bool(self.state.won) if done else None)


def said(text):
    """What the game says, without the prompt and the line of the score behind it."""
    return text.partition("\n>")[0].strip()


def made(folder, rooms, objects, quest, game):
    """The file of a game; several processes may make it at once, and the first of them is taken."""
    import textworld

    place = folder / f"{rooms}-{objects}-{quest}-{game}"
    if not place.exists():
        options = textworld.GameOptions()
        options.seeds, options.nb_rooms, options.nb_objects, options.quest_length = game, rooms, objects, quest
        folder.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder))
        options.path = str(beside / "game.z8")
        textworld.make(options)
        try:
            beside.rename(place)
        except OSError:  # it is there by now
            shutil.rmtree(beside)
    return place / "game.z8"
