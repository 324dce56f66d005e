"""Sequences with pictures for vLLM in this process: what it is given in the place of ids that stand for pictures.

vLLM's own processor looks at each picture once; ids, and where among them the picture's places are, stay those that the
trainer has. So both read one and the same sequence, whatever text vLLM would write around a picture.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from posttrain.data.picture_text import FIRST, PictureText, Seen
from posttrain.data.pictures import MAX_PICTURES
from posttrain.errors import EngineError

SETTINGS: dict[str, Any] = {
    "limit_mm_per_prompt": {"image": MAX_PICTURES},
    "skip_mm_profiling": True,  # with as many of the largest pictures at once
    "mm_processor_cache_gb": 0,  # what it has made of pictures is kept here
    "mm_hasher_algorithm": "sha256",  # its default wants a package
    "skip_tokenizer_init": False,  # its processor of pictures wants one
}
"""Of an engine that takes pictures."""

KEPT = 1024
"""Pictures of which is kept what vLLM's processor has made."""


class PicturedRequests:
    """Sends requests to an engine.

    Args:
        llm: the engine, started with `SETTINGS` from a folder with the processor.
        pictures: as the policy's tokenizer has them.
        pad_id: what a token of pictures is read as that the policy itself has written.
    """

    def __init__(self, llm: Any, pictures: PictureText, pad_id: int) -> None:
        self.llm, self.pictures, self._sent = llm, pictures, 0
        self._items: OrderedDict[int, Any] = OrderedDict()
        token = pictures.token_id
        llm.apply_model(lambda model: _read_written_as(model, token, pad_id))

    def forget(self) -> None:
        """Drop what older weights have made of pictures."""
        self.llm.llm_engine.reset_encoder_cache()

    def __call__(self, sequences: Sequence[Sequence[int]], parameters: Sequence[Any], lora: Any) -> list[Any]:
        """vLLM's outputs, in the order of the sequences.

        Raises:
            EngineError: vLLM sees a picture in another number of places than the model's own processor.
        """
        from vllm.sampling_params import RequestOutputKind

        engine, names = self.llm.llm_engine, []
        for ids, wanted in zip(sequences, parameters, strict=True):
            self._sent += 1
            names.append(f"pictured-{self._sent}")
            wanted.output_kind = RequestOutputKind.FINAL_ONLY
            engine.add_request(names[-1], self._input(ids), wanted, lora_request=lora)
        found: dict[str, Any] = {}
        while engine.has_unfinished_requests():
            found |= {output.request_id: output for output in engine.step() if output.finished}
        return [found[name] for name in names]

    def _input(self, ids: Sequence[int]) -> Any:
        from vllm.inputs.engine import mm_input, tokens_input
        from vllm.multimodal.inputs import PlaceholderRange

        plain = self.named(ids)
        begins = [
            place for place, token in enumerate(ids) if token >= FIRST and token == self.pictures.of_id(token).first
        ]
        if not begins:
            return tokens_input(plain)
        items, names, ranges = [], [], []
        for place in begins:
            seen, end = self.pictures.of_id(ids[place]), place
            left = seen.places
            while left:  # tokens that are no places may stand between them: ends of lines of tiles
                left -= ids[end] >= FIRST
                end += 1
            mask = torch.tensor([token >= FIRST for token in ids[place:end]])
            items.append(self._item(seen))
            names.append(f"{seen.first:x}")
            ranges.append(PlaceholderRange(place, end - place, mask))
        return mm_input(plain, {"image": items}, {"image": names}, {"image": ranges})

    def named(self, ids: Sequence[int]) -> list[int]:
        """The ids, with the model's own token of pictures for their places."""
        return [self.pictures.token_id if token >= FIRST else token for token in ids]

    def _item(self, seen: Seen) -> Any:
        """What vLLM's processor makes of a picture."""
        if seen.first not in self._items:
            given = {"prompt": self.pictures.placeholder, "multi_modal_data": {"image": seen.picture.load()}}
            (made,) = self.llm.llm_engine.renderer.render_cmpl([given])
            places = made["mm_placeholders"]["image"][0].get_num_embeds()
            if places != seen.places:
                raise EngineError(
                    f"vLLM sees a picture in {places} places, and the model's processor in {seen.places}",
                    where="rollouts.engine",
                    hint="take rollouts.engine: transformers",
                )
            self._items[seen.first] = made["mm_kwargs"]["image"][0]
            while len(self._items) > KEPT:
                self._items.popitem(last=False)
        self._items.move_to_end(seen.first)
        return self._items[seen.first]


def _read_written_as(model: Any, token: int, pad_id: int) -> None:
    """Let a token of pictures stand for nothing where there is no picture, as in training (`models.eyes`)."""
    own = model.embed_input_ids

    def embed(input_ids: torch.Tensor, *arguments: Any, is_multimodal: torch.Tensor | None = None, **more: Any) -> Any:
        written = input_ids == token
        if is_multimodal is not None:
            written &= ~is_multimodal.to(written.device)
            more["is_multimodal"] = is_multimodal
        return own(input_ids.masked_fill(written, pad_id), *arguments, **more)

    model.embed_input_ids = embed
