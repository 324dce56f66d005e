"""Shapes of what looks at pictures, from the config of a model of text and pictures. Imports without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.config.pictures import Part, TowerInit

Config = Mapping[str, Any]


def patch_side(config: Config) -> int:
    """Pixels of a side of the patches that the tower reads."""
    side = config["vision_config"]["patch_size"]
    return int(side if isinstance(side, int) else side[0])


def patches_of_vector(config: Config) -> int:
    """Patches that become one of the vectors that the projector reads; 1 where it reads each."""
    vision = config["vision_config"]
    for keys in (config, vision):
        for name in ("scale_factor", "spatial_merge_size"):
            if isinstance(keys.get(name), int):
                return int(keys[name]) ** 2
    if isinstance(config.get("downsample_ratio"), float):
        return round(1 / config["downsample_ratio"]) ** 2
    if isinstance(config.get("mm_tokens_per_image"), int):
        return (vision["image_size"] // patch_side(config)) ** 2 // int(config["mm_tokens_per_image"])
    return 1


@dataclass(frozen=True, slots=True)
class SightShape:
    """A tower of layers like those of a transformer, and what makes tokens of what it sees.

    Attributes:
        patch, merge: as in `patch_side` and `patches_of_vector`.
        hidden_size, intermediate_size, layers: of the tower.
        linears: linear modules of one of its layers, name to (inputs, outputs); all have biases.
        norm: parameters of a norm in a layer, of which there are two.
        outside: parameters of the tower outside its layers.
        projector: parameters of the projector.
        projector_linears: (name, inputs, outputs) of its linear modules.
    """

    patch: int
    merge: int
    hidden_size: int
    intermediate_size: int
    layers: int
    linears: Mapping[str, tuple[int, int]]
    norm: int
    outside: int
    projector: int
    projector_linears: tuple[tuple[str, int, int], ...]

    @property
    def tower(self) -> int:
        """Parameters of the tower."""
        layer = sum((inputs + 1) * outputs for inputs, outputs in self.linears.values()) + 2 * self.norm
        return self.layers * layer + self.outside

    @property
    def parameters(self) -> int:
        """Of both."""
        return self.tower + self.projector

    @property
    def kept(self) -> int:
        """Numbers that a layer of the tower keeps of a patch for its backward pass: what its norms, its linear modules,
        its attention (queries and keys once more, turned) and its activation read."""
        outputs = sum(width for _, width in self.linears.values())
        return 4 * self.hidden_size + outputs + 2 * self.hidden_size + self.intermediate_size

    def names(self, part: Part) -> set[str]:
        """Names of the linear modules of a part, without what they stand in."""
        return set(self.linears) if part == "tower" else {name for name, _, _ in self.projector_linears}

    def lora_parameters(self, part: Part, r: int, target_modules: list[str] | str) -> int:
        """r * (inputs + outputs) for each adapted linear module of a part."""
        every = [(name, *sizes) for name, sizes in self.linears.items()] * self.layers
        linears = every if part == "tower" else self.projector_linears
        named = None if target_modules == "all-linear" else {name.split(".")[-1] for name in target_modules}
        return sum(r * (inputs + outputs) for name, inputs, outputs in linears if named is None or name in named)


def sight_shape(config: Config) -> SightShape | None:
    """The shape of tower and projector by a config.json; None for types that are not known here, and where the file
    leaves a size to the config's class."""
    kind, vision, text = config.get("model_type"), config.get("vision_config"), config.get("text_config") or config
    if kind not in _KNOWN or not isinstance(vision, Mapping):
        return None
    try:
        return _KNOWN[kind](config, vision, int(text["hidden_size"]))
    except KeyError:
        return None


def init_sight(tower: TowerInit, text: int) -> SightShape:
    """The shape of what `model.init` makes, before a language model of this width."""
    vision = {
        "hidden_size": tower.hidden_size,
        "intermediate_size": 3 * tower.hidden_size,
        "num_hidden_layers": tower.layers,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
    }
    return _idefics3({"scale_factor": tower.merge, "vision_config": vision}, vision, text)


Linears = tuple[tuple[str, int, int], ...]


def _siglip(config: Config, vision: Config, projector: int, projector_linears: Linears) -> SightShape:
    hidden, inner, side = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    places = (vision["image_size"] // side) ** 2
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (hidden, hidden))
    return SightShape(
        patch=side,
        merge=patches_of_vector(config),
        hidden_size=hidden,
        intermediate_size=inner,
        layers=vision["num_hidden_layers"],
        linears=attention | {"fc1": (hidden, inner), "fc2": (inner, hidden)},
        norm=2 * hidden,
        outside=3 * side**2 * hidden + hidden + places * hidden + 2 * hidden,
        projector=projector,
        projector_linears=projector_linears,
    )


def _idefics3(config: Config, vision: Config, text: int) -> SightShape:
    read = vision["hidden_size"] * config["scale_factor"] ** 2
    return _siglip(config, vision, read * text, (("proj", read, text),))


def _gemma3(config: Config, vision: Config, text: int) -> SightShape:
    return _siglip(config, vision, vision["hidden_size"] * (text + 1), ())


def _llava_onevision(config: Config, vision: Config, text: int) -> SightShape:
    linears = (("linear_1", vision["hidden_size"], text), ("linear_2", text, text))
    return _siglip(config, vision, _with_biases(linears) + text, linears)


def _with_biases(linears: Linears) -> int:
    return sum((inputs + 1) * outputs for _, inputs, outputs in linears)


def _qwen2_5_vl(config: Config, vision: Config, text: int) -> SightShape:
    hidden, inner, read = vision["hidden_size"], vision["intermediate_size"], _merged(vision)
    merger = (("0", read, read), ("2", read, text))
    return SightShape(
        patch=vision["patch_size"],
        merge=patches_of_vector(config),
        hidden_size=hidden,
        intermediate_size=inner,
        layers=vision["depth"],
        linears={
            "qkv": (hidden, 3 * hidden),
            "proj": (hidden, hidden),
            **dict.fromkeys(("gate_proj", "up_proj"), (hidden, inner)),
            "down_proj": (inner, hidden),
        },
        norm=hidden,
        outside=_of_patch(vision),
        projector=_with_biases(merger) + hidden,
        projector_linears=merger,
    )


def _qwen3_vl(config: Config, vision: Config, text: int) -> SightShape:
    hidden, inner, read = vision["hidden_size"], vision["intermediate_size"], _merged(vision)
    merger, deeper = (("linear_fc1", read, read), ("linear_fc2", read, text)), len(vision["deepstack_visual_indexes"])
    return SightShape(
        patch=vision["patch_size"],
        merge=patches_of_vector(config),
        hidden_size=hidden,
        intermediate_size=inner,
        layers=vision["depth"],
        linears={
            "qkv": (hidden, 3 * hidden),
            "proj": (hidden, hidden),
            "linear_fc1": (hidden, inner),
            "linear_fc2": (inner, hidden),
        },
        norm=2 * hidden,
        outside=_of_patch(vision) + hidden + vision["num_position_embeddings"] * hidden,
        projector=(1 + deeper) * _with_biases(merger) + 2 * hidden + deeper * 2 * read,
        projector_linears=merger * (1 + deeper),
    )


def _merged(vision: Config) -> int:
    return int(vision["hidden_size"] * vision["spatial_merge_size"] ** 2)


def _of_patch(vision: Config) -> int:
    return int(3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2 * vision["hidden_size"])


_KNOWN = {
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": _idefics3,
}
