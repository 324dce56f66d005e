"""Pictures in front of a model: places of pictures among its token ids become what it sees of them.

A hook before the part of a vision-language model that holds tower, projector and language model takes ids as
`data.picture_text` writes them, gives the model its own token of pictures in their place, and what the tower and the
projector make of each picture. So everything that calls the model with token ids (its own forward, the scoring passes,
the sampling engine, the proof before step 1) may hand it sequences with pictures.

A picture is encoded once for all its places in a pass, with those of one shape beside each other, and the gradient of
all of them goes through that one encoding. A tower and projector that are not trained look at it once in a run. What
the model makes of it is its own code: `get_image_features`, and `mm_encoder_outputs` of its forward.

Positions of several axes (M-RoPE) are the model's own too (`get_rope_index`). While a text is being written, what they
are ahead or behind the number of tokens is kept beside the cache, row by row. In a pass that computes what rows share
once (`models.shared_prefix`) they go on from segment to segment, and a picture is never cut by the end of one.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.config.pictures import Part
from posttrain.data.picture_text import FIRST, PLACES, PictureText, Seen
from posttrain.errors import ModelError
from posttrain.models.shared_prefix import Layout, Segment
from posttrain.models.sharing import EYES

PROJECTORS = ("multi_modal_projector", "connector", "merger", "deepstack_merger_list", "image_newline", "projector")
"""Names of what stands between tower and language model."""

KEPT = 256 * 2**20
"""Bytes of pictures that are kept as the tower takes them, and of what frozen towers have made of pictures."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a tower and a projector have made of a picture.

    Attributes:
        pooled: (places, H).
        deeper: the same for each layer of the language model that gets some of its own.
        apart: whether the model gives such tensors for every picture, in place of one for all.
    """

    pooled: Tensor
    deeper: list[Tensor]
    apart: bool

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(x.nbytes for x in (self.pooled, *self.deeper))

    def of_no_place(self) -> Encoded:
        """None of it, and still a part of whatever is made with it."""
        return Encoded(self.pooled[:0], [layer[:0] for layer in self.deeper], self.apart)


class Remembered:
    """What frozen towers have made of the last pictures, so that they need not look again.

    It holds for the very weights that have looked, wherever somebody else has put them, and under the same autocast.
    Nothing is kept of a tower that is trained, or that drops a part of what it sees.
    """

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[nn.Module, tuple[Any, OrderedDict[int, Encoded]]] = WeakKeyDictionary()

    def of(self, trunk: nn.Module) -> OrderedDict[int, Encoded] | None:
        """By the id of a picture's first place; None where nothing may be kept."""
        if any(module.training and _drops(module) for child in _looking(trunk) for module in child.modules()):
            return None
        weights = [p for child in _looking(trunk) for p in child.parameters()] + list(trunk._parameters.values())
        if any(p is None or p.requires_grad for p in weights):
            return None
        device = weights[0].device.type
        casting = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        stamp = (casting, tuple((p.data_ptr(), p._version) for p in weights))
        if trunk not in self._kept or self._kept[trunk][0] != stamp:
            self._kept[trunk] = stamp, OrderedDict()
        return self._kept[trunk][1]

    def keep(self, known: OrderedDict[int, Encoded], found: Mapping[int, Encoded]) -> None:
        """Take in what was seen, and forget what was not seen for the longest time."""
        for first, encoded in found.items():
            known[first] = encoded
            known.move_to_end(first)
        while len(known) > len(found) and sum(each.size for each in known.values()) > KEPT:
            known.popitem(last=False)


@dataclass(eq=False)
class Eyes:
    """The hook, for one kind of model. It holds no part of a model, so that copies of a model may share it.

    Attributes:
        pictures: as the tokenizer has them.
        features: arguments of `get_image_features`.
        types: name of the argument that says which tokens are pictures; None where there is none.
        spatial: positions have several axes.
        mutual: the places of a picture see each other whatever their order.
        filler: id that stands where the policy itself has written the token of pictures, which stands for nothing then.
        trained: parts that are trained.
        kept: the last pictures, as the tower takes them.
        remembered: what frozen towers have made of them.
        most: the largest of the ranks' numbers. Where the launch wants all ranks to go through the same parts, those
            with fewer pictures look at one for nothing as often as the others look; None where each may look for
            itself.
    """

    pictures: PictureText
    features: frozenset[str]
    types: str | None
    spatial: bool
    mutual: bool
    filler: int
    trained: Sequence[Part]
    kept: OrderedDict[int, dict[str, Tensor]] = field(default_factory=OrderedDict)
    remembered: Remembered = field(default_factory=Remembered)
    most: Callable[[int], int] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Eyes:
        return self

    def __call__(self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """A forward pre-hook of the trunk."""
        if args:  # a classifier hands its ids on without their name
            (kwargs["input_ids"],), args = args, ()
        ids = kwargs.get("input_ids")
        if ids is None:
            return None
        token = self.pictures.token_id
        places = ids >= FIRST
        written = ids == token
        rows, whole = self._rows(ids, places) if bool(places.any()) else ([], places)
        taken = ids.masked_fill(written | (places & ~whole), self.filler).masked_fill(whole, token)
        order = [seen for row in rows for seen in row]
        found = self._looked_at(trunk, order)
        given = kwargs | {"input_ids": taken}
        if found is not None:
            given["mm_encoder_outputs"] = {"image": found}
        if not order:
            self._follow(given)
            return args, given
        if self.types is not None:
            given[self.types] = whole.int()
        layout: Layout | None = kwargs.get("layout")
        if self.spatial and layout is None:
            given |= self._positions(trunk, given, order)
        elif self.spatial and layout is not None:
            given["position_ids"] = self._packed_positions(trunk, given, ids, layout)
        elif self.mutual and layout is not None:
            given["layout"] = replace(layout, blocks=_blocks(ids[0], whole[0]))
        return args, given

    # ------------------------------------------------------------------------------------------------ to be tried with

    @property
    def has_seen(self) -> bool:
        """Whether there are pictures to try a model with."""
        return bool(self.pictures.all_seen)

    def first_scored(self, ids: Sequence[int]) -> int:
        """The place from which on a row of a proof is scored: nobody writes pictures."""
        return max([len(ids) // 2, *(place + 1 for place, token in enumerate(ids) if token >= FIRST)])

    def named(self, ids: Tensor) -> Tensor:
        """The ids, with the model's own token of pictures for their places."""
        return ids.masked_fill(ids >= FIRST, self.pictures.token_id)

    @staticmethod
    def looking_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
        """Those of the parts of a policy, adapted or not, that look at pictures: no token goes through them."""
        policy: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        return (parameter for child in _looking(policy.base_model) for parameter in child.parameters())

    @staticmethod
    def looking_parts(model: nn.Module) -> Iterator[tuple[Part, nn.Parameter]]:
        """The same with the part that each belongs to, without tables of places, which nothing is multiplied with."""
        policy: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        looking = {id(child) for child in _looking(policy.base_model)}
        for name, child in policy.base_model.named_children():
            for path, module in child.named_modules() if id(child) in looking else ():
                steps = (name, *path.split("."))
                part: Part = "projector" if any(step in PROJECTORS for step in steps) else "tower"
                for parameter in () if isinstance(module, nn.Embedding) else module.parameters(recurse=False):
                    yield part, parameter

    def texts(self, rows: Iterable[Sequence[int]]) -> list[list[int]]:
        """The rows without their pictures."""
        return [[token for token in row if token < FIRST] for row in rows]

    def trial_rows(self, text: Sequence[int], positions: int | None) -> list[list[int]] | None:
        """Rows as `proof.trial_rows` has them, with the smallest pictures seen so far: one in the beginning that two
        rows share, and two in a shorter row.

        Args:
            text: 24 tokens at least, to put between them.
            positions: of the model.
        """
        seen = sorted(self.pictures.all_seen, key=lambda each: (each.places, each.first))
        if not seen:
            return None
        first, *_, last = [*seen[:2], *seen[:2]]
        shared = [*text[:2], *first.ids, text[2]]
        rows = [[*shared, *text[3:11]], [*shared, *text[11:19]]]
        rows.append([text[19], *first.ids, text[20], *last.ids, *text[21:24]])
        return None if positions is not None and max(map(len, rows)) > positions else rows

    # ------------------------------------------------------------------------------------------------ which pictures

    def _rows(self, ids: Tensor, places: Tensor) -> tuple[list[list[Seen]], Tensor]:
        """The pictures of each row, and (B, T) the places of those that are whole.

        Behind what is read of a row there may be the beginning of one: passes end at the last token that is scored,
        and are padded with whatever stands there.
        """
        rows, whole = [], places.clone()
        for number, row in enumerate(ids.cpu()):
            columns = (row >= FIRST).nonzero().squeeze(1).tolist()
            tokens = row[columns].tolist()
            found: list[Seen] = []
            at = 0
            while at < len(tokens):
                seen = self.pictures.of_id(tokens[at])
                if tokens[at : at + seen.places] != seen.ids:
                    whole[number, columns[at] :] = False
                    break
                found.append(seen)
                at += seen.places
            rows.append(found)
        return rows, whole

    # ------------------------------------------------------------------------------------------------ what is seen

    def _looked_at(self, trunk: nn.Module, order: Sequence[Seen]) -> Any:
        """What the tower and the projector make of these pictures, each encoded once, in the model's own form.

        What is looked at for nothing stands before them, without a place: its gradient is zero, and there.
        """
        distinct = list({seen.first: seen for seen in order}.values())
        known = self.remembered.of(trunk)
        found = {} if known is None else {seen.first: known[seen.first] for seen in distinct if seen.first in known}
        new = self._alike([seen for seen in distinct if seen.first not in found])
        idle = 0 if self.most is None else self.most(len(new)) - len(new)  # agreed before anybody looks
        for alike in new:
            found |= zip((seen.first for seen in alike), self._encoded(trunk, alike), strict=True)
        if known is not None:
            self.remembered.keep(known, found)
        every = [found[seen.first] for seen in order]
        for _ in range(idle):
            smallest = min(self.pictures.all_seen, key=lambda each: (each.places, each.first))
            every.insert(0, self._encoded(trunk, [smallest])[0].of_no_place())
        if not every:
            return None
        return SimpleNamespace(
            pooler_output=[each.pooled for each in every] if every[0].apart else _joined(every),
            deepstack_features=[list(layer) for layer in zip(*(each.deeper for each in every), strict=True)],
        )

    def _alike(self, pictures: Sequence[Seen]) -> list[list[Seen]]:
        """Pictures that can be encoded beside each other."""
        shapes: dict[tuple[Any, ...], list[Seen]] = {}
        for seen in pictures:
            shapes.setdefault(_shape(self._arrays(seen)), []).append(seen)
        return list(shapes.values())

    def _encoded(self, trunk: nn.Module, alike: Sequence[Seen]) -> list[Encoded]:
        """Pictures of one shape, encoded beside each other."""
        device, dtype = _device_and_type(trunk)
        every = [self._arrays(seen) for seen in alike]
        arrays = {name: torch.cat([one[name] for one in every]).to(device) for name in every[0]}
        arrays = {name: x.to(dtype) if x.is_floating_point() else x for name, x in arrays.items()}
        output = trunk.get_image_features(**arrays, **_defaults(trunk, self.features), return_dict=True)
        places = [seen.places for seen in alike]
        pooled = _flat(output.pooler_output).split(places)
        deeper = [_flat(layer).split(places) for layer in getattr(output, "deepstack_features", None) or ()]
        apart = not isinstance(output.pooler_output, Tensor)
        return [Encoded(of_one, [layer[i] for layer in deeper], apart) for i, of_one in enumerate(pooled)]

    def _arrays(self, seen: Seen) -> dict[str, Tensor]:
        """What the tower is given of a picture. The last ones are kept: a picture of a group is asked for again."""
        kept = self.kept
        if seen.first not in kept:
            arrays = self.pictures.arrays(seen).items()
            kept[seen.first] = {name: torch.from_numpy(value) for name, value in arrays if name in self.features}
            while sum(x.nbytes for one in kept.values() for x in one.values()) > KEPT and len(kept) > 1:
                kept.popitem(last=False)
        kept.move_to_end(seen.first)
        return kept[seen.first]

    # ------------------------------------------------------------------------------------------------ positions

    def _positions(self, trunk: nn.Module, given: dict[str, Any], order: Sequence[Seen]) -> dict[str, Any]:
        types = given[str(self.types)]
        positions, ahead = self._counted(trunk, given["input_ids"], types, order, given.get("attention_mask"))
        cache = given.get("past_key_values")
        if cache is not None:
            _keep_ahead(cache, ahead.view(-1))
        return {"position_ids": positions}

    def _counted(
        self, trunk: nn.Module, ids: Tensor, types: Tensor, order: Sequence[Seen], mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Positions (3, B, T) of rows with these pictures, and (B, 1) what they are ahead of the number of tokens."""
        grids = torch.cat([self._arrays(seen)["image_grid_thw"] for seen in order]).to(ids.device)
        return trunk.get_rope_index(ids, image_grid_thw=grids, attention_mask=mask, mm_token_type_ids=types)

    def _packed_positions(self, trunk: nn.Module, given: dict[str, Any], ids: Tensor, layout: Layout) -> Tensor:
        """(3, 1, T) of a pass in segments, from places (1, T) in the rows. `ids` are those with pictures."""
        positions = given["position_ids"].expand(3, -1, -1).clone()
        ahead: dict[Segment, int] = {}
        for part, path in (each for root in layout.groups for each in root.walk()):
            segment = part.segment
            own = slice(segment.start, segment.start + segment.length)
            before = ahead[path[-1].segment] if path else 0
            ahead[segment] = before
            (order,), _ = self._rows(ids[:, own], ids[:, own] >= FIRST)
            if order:
                taken = given["input_ids"][:, own], given[str(self.types)][:, own]
                counted, further = self._counted(trunk, *taken, order)
                positions[:, :, own] = counted + part.before + before
                ahead[segment] += int(further)
            else:
                positions[:, :, own] += before
        return positions

    def _follow(self, kwargs: dict[str, Any]) -> None:
        """Positions of tokens behind pictures that a cache has taken in."""
        ahead = getattr(kwargs.get("past_key_values"), "ahead", None)
        if ahead is not None and kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = (kwargs["position_ids"] + ahead[:, None]).expand(3, -1, -1)


def _keep_ahead(cache: Any, ahead: Tensor) -> None:
    """Keep what the positions of each row are ahead of its tokens, through whatever is done to the cache's rows."""
    own = cache.reorder_cache

    def reorder(rows: Tensor) -> None:
        own(rows)
        cache.ahead = cache.ahead[rows]

    cache.ahead, cache.reorder_cache = ahead, reorder


def _blocks(ids: Tensor, places: Tensor) -> Tensor:
    """(T,) numbers of the pictures that ids are places of, and -1 of other ids."""
    begins = places & (ids & (PLACES - 1) == 0)
    return begins.cumsum(0).sub(1).masked_fill(~places, -1)


def _joined(every: Sequence[Encoded]) -> Tensor:
    return torch.cat([each.pooled for each in every]).unsqueeze(0)


def _flat(features: Any) -> Tensor:
    """(tokens, H) of what a model gives for pictures: one tensor, or one for each."""
    return features.flatten(0, -2) if isinstance(features, Tensor) else torch.cat(list(features))


def _shape(arrays: dict[str, Tensor]) -> tuple[Any, ...]:
    """What pictures must have in common to be encoded beside each other."""
    return tuple((name, tuple(x.shape[1:])) for name, x in sorted(arrays.items()))


def _drops(module: nn.Module) -> bool:
    """Whether a module in training leaves out a part at random."""
    shares = (getattr(module, name, None) for name in ("p", "dropout", "attention_dropout"))
    return any(isinstance(share, float) and share > 0 for share in shares)


def _looking(trunk: nn.Module) -> list[nn.Module]:
    """The parts of a trunk that look at pictures: all but the language model."""
    table = trunk.get_input_embeddings()
    return [child for child in trunk.children() if not any(module is table for module in child.modules())]


def _device_and_type(trunk: nn.Module) -> tuple[torch.device, torch.dtype]:
    first = next(p for p in trunk.parameters() if p.is_floating_point())
    return first.device, first.dtype


def _defaults(trunk: nn.Module, wanted: frozenset[str]) -> dict[str, Any]:
    """Settings that a forward takes from the config and hands on."""
    names = ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio")
    return {name: getattr(trunk.config, name) for name in names if name in wanted and hasattr(trunk.config, name)}


# --------------------------------------------------------------------------------------------------- opening the eyes


def open_eyes(model: PreTrainedModel, pictures: PictureText, filler: int, trained: Sequence[Part]) -> None:
    """Let a model take sequences with pictures, and train some parts of it.

    Args:
        model: a language model or a classifier.
        pictures, filler, trained: as in `Eyes`.

    Raises:
        ModelError: it is none of text and pictures, or of a kind whose pictures cannot be given to it here.
    """
    trunk = model.base_model
    forward = inspect.signature(trunk.forward).parameters
    features = getattr(trunk, "get_image_features", None)
    if features is None or "mm_encoder_outputs" not in forward:
        raise ModelError(
            f"models of type {model.config.model_type!r} do not take pictures in the way that is built here",
            where="model.path",
            hint="Qwen2.5-VL, Qwen3-VL, Gemma 3, Idefics3 and LLaVA-OneVision do, with transformers 5.19",
        )
    names = frozenset(inspect.signature(features).parameters)
    types = next((name for name in ("mm_token_type_ids", "token_type_ids") if name in forward), None)
    # The older name of the types is that of models which only look there for what sees each other.
    mutual = types == "token_type_ids"
    eyes = Eyes(pictures, names, types, hasattr(trunk, "get_rope_index"), mutual, filler, trained)
    trunk.register_forward_pre_hook(eyes, with_kwargs=True)
    for each in (model, trunk):  # of a critic the trunk alone is kept
        setattr(each, EYES, eyes)
    wanted = {name for part, names in parts(model).items() if part in trained for name in names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)


def open_alike(model: PreTrainedModel, policy: PreTrainedModel) -> None:
    """Let a model that begins as a copy of a policy see as that does, and train the same parts."""
    eyes: Eyes = getattr(policy, EYES)
    open_eyes(model, eyes.pictures, eyes.filler, eyes.trained)


def parts(model: PreTrainedModel) -> dict[str, list[str]]:
    """Names of the parameters of each part of a model of text and pictures."""
    trunk, table = model.base_model, model.get_input_embeddings()
    language = next(name for name, child in trunk.named_children() if any(m is table for m in child.modules()))
    looking = f"{model.base_model_prefix}."
    found: dict[str, list[str]] = {"language": [], "projector": [], "tower": []}
    for name, _ in model.named_parameters():
        steps = name.removeprefix(looking).split(".")
        if not name.startswith(looking) or steps[0] == language:
            found["language"].append(name)
        else:
            found["projector" if any(step in PROJECTORS for step in steps) else "tower"].append(name)
    return found


def frozen_modules(model: PreTrainedModel, trained: Sequence[Part]) -> list[str]:
    """Modules that an adapter leaves alone: those of the parts that are not trained."""
    kept = {name.rpartition(".")[0] for part, names in parts(model).items() if part in trained for name in names}
    every = {name.rpartition(".")[0] for names in parts(model).values() for name in names}
    return sorted(every - kept)
