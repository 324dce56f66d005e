"""Log-probs of a reference on disk: found again by content, whole or absent."""

import copy

import pytest
import torch

from posttrain.config.schema import ModelConfig
from posttrain.data.sample import Origin, Sample
from posttrain.errors import StateError
from posttrain.models.loading import load_policy
from posttrain.models.reference import Reference
from posttrain.models.reference_cache import ReferenceCache, samples_hash, weights_hash

LOGPS = [torch.tensor([0.0, -1.5, -2.25]), torch.tensor([0.0, -1e-7]), torch.tensor([0.0])]
MADE_FROM = {"weights": "a", "rows": "b", "template": "c", "precision": "d"}


@pytest.fixture
def cache(tmp_path):
    cache = ReferenceCache(tmp_path / "cache", MADE_FROM)
    cache.write(LOGPS)
    return cache


def test_what_was_written_is_read_bit_for_bit(cache):
    found = ReferenceCache(cache.path.parent, MADE_FROM).read()
    assert len(found) == len(LOGPS) and all(torch.equal(a, b) for a, b in zip(found, LOGPS, strict=True))
    assert [path.name for path in cache.path.parent.iterdir()] == [cache.path.name]


@pytest.mark.parametrize("part", list(MADE_FROM))
def test_anything_else_is_another_file(part, cache):
    other = ReferenceCache(cache.path.parent, MADE_FROM | {part: "another"})
    assert other.path != cache.path and other.read() is None and other.damaged is None


def test_a_truncated_file_is_named_and_passed_over(cache):
    cache.path.write_bytes(cache.path.read_bytes()[:-3])
    assert cache.read() is None and str(cache.path) in cache.damaged


def test_a_flipped_bit_is_found(cache):
    whole = bytearray(cache.path.read_bytes())
    whole[-2] ^= 1
    cache.path.write_bytes(whole)
    assert cache.read() is None and "checksum" in cache.damaged


def test_a_write_that_fails_leaves_nothing_half_written(cache, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("posttrain.models.reference_cache.save_file", full)
    before = cache.path.read_bytes()
    with pytest.raises(StateError, match="No space left") as caught:
        cache.write(LOGPS)
    assert "reference.cache" in caught.value.hint
    assert cache.path.read_bytes() == before and len(list(cache.path.parent.iterdir())) == 1


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(StateError, match="cannot keep"):
        ReferenceCache(tmp_path / "cache", MADE_FROM).write(LOGPS)


def test_one_weight_changes_the_hash():
    init = {"hidden_size": 16, "layers": 1, "heads": 2, "tokenizer": {"type": "characters"}}
    model, _ = load_policy(ModelConfig(init=init), seed=0)
    other = copy.deepcopy(model)
    assert weights_hash(model) == weights_hash(other)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.view(-1)[17].add_(1e-6)
    assert weights_hash(model) != weights_hash(other)
    assert weights_hash(model) != weights_hash(copy.deepcopy(model).to(torch.bfloat16))


def test_ids_masks_and_order_change_the_hash():
    def sample(ids, mask, problem="p"):
        return Sample(ids, mask, Origin.EXPERT, problem)

    rows = [sample([1, 2], [0, 1]), sample([3], [1])]
    assert samples_hash(rows) == samples_hash([sample([1, 2], [0, 1], "elsewhere"), sample([3], [1])])
    for others in ([rows[1], rows[0]], [sample([1, 2], [1, 1]), rows[1]], [sample([1, 4], [0, 1]), rows[1]]):
        assert samples_hash(rows) != samples_hash(others)


def test_a_reference_that_is_not_in_memory_scores_nothing_new():
    with pytest.raises(RuntimeError, match="not in memory"):
        Reference(None, known=LOGPS).token_logps(*(torch.ones(1, 2) for _ in range(3)))
