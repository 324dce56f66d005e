"""How good an action is in the place of the expert's, for recipes/agents/uis1-rooms.yaml."""

DIRECTIONS = ("north", "south", "east", "west")


def grade(action: str, expected: str) -> float:
    """1 for the same words; 0.9 for another door, as of an unknown map one door is nearly as good as another; else 0.1.

    The map that the episode was recorded in is not asked. Another door stays a divergence, which is patched.
    """
    said, wanted = action.split(), expected.split()
    if said == wanted:
        return 1.0
    door = len(said) == 2 and said[0] == wanted[0] == "go" and said[1] in DIRECTIONS
    return 0.9 if door else 0.1 if said else 0.0
