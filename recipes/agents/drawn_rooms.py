"""Rooms whose doors and things are drawn: a picture of the room one stands in, and a word on the last action."""

from PIL import Image

from posttrain.data.sample import Problem
from posttrain.environments.pictures import shown
from posttrain.environments.rooms import NAMES, Rooms

SIDE, WALL, DOOR = 32, 4, 8
"""Pixels of a side of the picture, of a wall's thickness, and of a door's width."""

KEY, CHEST = (255, 255, 0), (255, 128, 0)


class DrawnRooms(Rooms):
    """The world of `task: rooms`, seen in pictures. The prompt says the first room in words, and it is drawn too."""

    def reset(self, problem: Problem, seed: int) -> str:
        """The first room, drawn."""
        super().reset(problem, seed)
        return self.look()

    def look(self, note: str = "") -> str:
        """A word on the last action, and the picture of the room."""
        return note + shown(draw(super().look()))


def draw(said: str) -> Image.Image:
    """The picture of a room that is told in words: walls with a gap for each door, and squares for what lies there."""
    words = said.split()
    name = next(word for word in words if word in NAMES)
    shade = 40 + 20 * NAMES.index(name)
    image = Image.new("RGB", (SIDE, SIDE), (shade, 60, 255 - shade))
    middle, far = (SIDE - DOOR) // 2, SIDE - WALL
    for box in ((0, 0, SIDE, WALL), (0, far, SIDE, SIDE), (0, 0, WALL, SIDE), (far, 0, SIDE, SIDE)):
        image.paste((0, 0, 0), box)
    doors = {
        "north": (middle, 0, middle + DOOR, WALL),
        "south": (middle, far, middle + DOOR, SIDE),
        "west": (0, middle, WALL, middle + DOOR),
        "east": (far, middle, SIDE, middle + DOOR),
    }
    for way in words[words.index("exits") :]:
        if way in doors:
            image.paste((255, 255, 255), doors[way])
    for thing, colour, left in (("key", KEY, 8), ("chest", CHEST, 18)):
        if thing in words:
            image.paste(colour, (left, 12, left + 6, 18))
    return image
