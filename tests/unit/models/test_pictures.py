"""Models of text and pictures: what we compute of them is what their own forward computes of their own processor's
inputs. Five families, built tiny, in float64."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

from posttrain.config.pictures import PictureConfig
from posttrain.config.schema import FileSource, Lora, ModelConfig, ModelInit
from posttrain.data.picture_text import FIRST
from posttrain.data.rendering import Renderer
from posttrain.data.sample import Origin, Sample
from posttrain.data.sources import examples
from posttrain.errors import DataError, ModelError
from posttrain.models import loading, shared_prefix
from posttrain.models.adapters import lora_config
from posttrain.models.collate import collate
from posttrain.models.eyes import frozen_modules, open_eyes, parts
from posttrain.models.loading import load_policy
from posttrain.models.processor import OLDEST
from posttrain.models.proof import prove_scoring
from posttrain.models.reference import frozen_copy
from posttrain.models.sharing import EYES
from posttrain.models.size import size_of
from posttrain.models.token_logps import prepare, token_logps, token_logps_and_divergence, token_states, token_values
from posttrain.models.value import Critic, attach, value_model
from posttrain.objectives.next_token import reverse_kl
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.texts import sampling_way
from posttrain.rollouts.transformers_engine import TransformersEngine

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < OLDEST, reason="an older transformers, with which pictures are refused"
)

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "tiny_vlms.py"
SPEC = importlib.util.spec_from_file_location("tiny_vlms", FIXTURE)
tiny_vlms = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tiny_vlms)

EVERYTHING = ["language", "projector", "tower"]

ASKED = ["<image>\nwhat?", "see <image> and <image> now", "none", "<image>again", "<image>\nwhat?"]
ANSWERED = ["a cat", "two of them", "no", "yes", "a dog"]
SHOWN = [["0.png"], ["1.png", "2.png"], [], ["2.png"], ["0.png"]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with no picture, one and two, of three sizes; two rows show the same one."""
    folder = tmp_path_factory.mktemp("rows")
    random = np.random.RandomState(0)
    for number, (height, width) in enumerate([(24, 40), (16, 16), (32, 16)]):
        pixels = random.randint(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    lines = [
        {
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}],
            "images": shown,
        }
        for asked, answered, shown in zip(ASKED, ANSWERED, SHOWN, strict=True)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Case(NamedTuple):
    own: Any  # the model, as transformers has it
    processor: Any
    model: Any  # the same, loaded by us
    renderer: Renderer
    samples: list[Sample]


@pytest.fixture(params=list(tiny_vlms.FAMILIES), scope="module")
def case(request: pytest.FixtureRequest, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    own, processor = tiny_vlms.saved(request.param, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loading.DTYPES, "float32", torch.float64)
        config = ModelConfig(path=str(folder), pictures=PictureConfig(train=EVERYTHING))
        model, tokenizer = load_policy(config, seed=0)
    renderer = Renderer(tokenizer)
    found = examples(FileSource(path=str(rows / "rows.jsonl"), images="images"), "rows")
    samples = [renderer.sample(example) for example in found]
    return Case(own, processor, model.eval(), renderer, samples)


def inputs(case: Case, rows: Path, number: int) -> dict[str, torch.Tensor]:
    """What the family's own processor makes of a row."""
    placeholder = case.renderer.tokenizer.chat_template.split("'image' %}")[1].split("{%")[0]
    text = f"<user>{ASKED[number].replace('<image>', placeholder)}<eos><assistant>{ANSWERED[number]}<eos>"
    images = [[Image.open(rows / name) for name in SHOWN[number]]] if SHOWN[number] else None
    made = case.processor(text=[text], images=images, return_tensors="pt", return_mm_token_type_ids=True)
    return {key: value.double() if value.is_floating_point() else value for key, value in made.items()}


def own_logps(case: Case, rows: Path, number: int) -> torch.Tensor:
    """(T,) log-probs of the tokens of a row by the model's own forward, 0 of the first."""
    made = inputs(case, rows, number)
    logps = case.own(**made, use_cache=False).logits[0, :-1].log_softmax(-1)
    return torch.cat([logps.new_zeros(1), logps.gather(-1, made["input_ids"][0, 1:, None]).squeeze(-1)])


def test_token_ids_are_those_of_the_processor(case: Case, rows: Path) -> None:
    token = case.model.config.image_token_id
    for number, sample in enumerate(case.samples):
        ids = [token if id >= FIRST else id for id in sample.ids]
        assert ids == inputs(case, rows, number)["input_ids"][0].tolist()
        places = [place for place, id in enumerate(sample.ids) if id >= FIRST]
        assert bool(places) == bool(SHOWN[number])
        assert not any(sample.loss_mask[place] for place in places)


def test_log_probs_and_gradients_are_the_models_own(case: Case, rows: Path) -> None:
    proof = prove_scoring(case.model, [sample.ids for sample in case.samples])
    assert proof.way == "packed", proof.why
    prepare(case.model)
    tensors = collate(case.samples, pad_id=0)  # ragged, padded beside each other, two rows with one picture
    found = token_logps(case.model, tensors["ids"], tensors["attention_mask"], tensors["mask"]).logps
    wanted = torch.zeros_like(found)
    for number, sample in enumerate(case.samples):
        wanted[number, : len(sample.ids)] = own_logps(case, rows, number)
    wanted = wanted * tensors["mask"]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    weights = torch.cos(torch.arange(found.numel(), dtype=found.dtype)).view_as(found)
    for model, logps in ((case.model, found), (case.own, wanted)):
        model.zero_grad()
        (logps * weights).sum().backward()
    theirs = dict(case.own.named_parameters())
    seen = set()
    for name, parameter in case.model.named_parameters():
        if theirs[name].grad is None:  # a part of the tower that the family does not use
            assert parameter.grad is None
            continue
        # Towers turn by angles in float32 whatever the type, and ours encodes the pictures of a batch together.
        assert (parameter.grad - theirs[name].grad).norm() <= 1e-5 * theirs[name].grad.norm() + 1e-12, name
        seen |= {part for part, names in parts(case.model).items() if name in names and parameter.grad.any()}
    assert seen == set(EVERYTHING)


def test_what_rows_share_of_their_pictures_is_computed_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures in a row and in different ones, rows that part at a picture and right behind one, unlike lengths."""
    monkeypatch.setitem(shared_prefix.CALL_FLOPS, "cpu", 0.0)  # what can be shared is
    monkeypatch.setattr(shared_prefix, "MERGE_FLOPS", 0)
    prepare(case.model)
    one, two, three = (each.ids for each in list(case.renderer.pictures.all_seen)[:3])
    common = [5, 6, *one, *range(9, 29), 7, *two]  # longer than a window
    rows = [[*common, 8, *range(9, 20)], [*common, 21], [*common, 8, 22, 23], [5, 6, *one, 7, *three, 24, 25]]
    rows += [[26, *three, 36, *one, 27, 28, 29], [26, *three, 36, *one, 30], [31, 32, 33], [31, 32, 34, 35]]
    scored = [3, 1, 2, 2, 3, 1, 1, 2]
    samples = [Sample(ids, [0] * (len(ids) - n) + [1] * n, Origin.POLICY) for ids, n in zip(rows, scored, strict=True)]
    tensors = collate(samples, pad_id=0)
    computed: list[int] = []
    counted = case.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found = token_logps(case.model, tensors["ids"], tensors["attention_mask"], tensors["mask"]).logps
    counted.remove()
    assert computed[0] < 0.7 * sum(len(row) - 1 for row in rows)
    wanted = torch.zeros_like(found)
    for number, row in enumerate(rows):
        logps = case.model(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        wanted[number, 1 : len(row)] = logps.gather(-1, torch.tensor(row)[1:, None].clamp(max=40)).squeeze(-1)
    wanted = wanted * tensors["mask"]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.cos(torch.arange(found.numel(), dtype=found.dtype)).view_as(found)
    trained = list(case.model.parameters())
    ours, own = (torch.autograd.grad((logps * weights).sum(), trained, allow_unused=True) for logps in (found, wanted))
    for mine, theirs in zip(ours, own, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:  # towers turn by angles in float32 whatever the type
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm() + 1e-12


@pytest.mark.parametrize("case", ["qwen2_5_vl", "gemma3"], indirect=True)
def test_a_divergence_is_of_what_both_models_see(case: Case) -> None:
    reference = frozen_copy(case.model)
    for parameter in reference.parameters():
        parameter.mul_(1.1)
    tensors = collate(case.samples, pad_id=0)
    rows = tensors["ids"], tensors["attention_mask"], tensors["mask"]
    ours, theirs = (model(input_ids=rows[0]).logits.log_softmax(-1).detach() for model in (case.model, reference))
    wanted = torch.zeros(rows[0].shape, dtype=ours.dtype)
    wanted[:, 1:] = reverse_kl(ours[:, :-1], theirs[:, :-1])
    for model in (case.model, reference):
        prepare(model)
    states = token_states(reference, *rows)
    found = token_logps_and_divergence(case.model, *rows, states, reverse_kl)[2]
    torch.testing.assert_close(found, wanted * rows[2], rtol=1e-9, atol=1e-9)
    assert found.sum() > 0 and found.requires_grad


@pytest.mark.parametrize("separate", [True, False])
def test_values_and_scores_are_of_what_is_seen(separate: bool, case: Case, rows: Path) -> None:
    """Of a critic for each token, packed, with a tower of its own or the policy's; of a reward model for each row."""
    classifier = value_model(case.model, pad_token_id=0)
    torch.nn.init.normal_(classifier.score.weight, generator=torch.Generator().manual_seed(1))
    tensors = collate(case.samples, pad_id=0)
    scored = classifier(input_ids=tensors["ids"], attention_mask=tensors["attention_mask"].long(), use_cache=False)
    prepare(case.model)
    attach(case.model, Critic(classifier, separate=separate))
    try:
        values = token_values(case.model, tensors["ids"], tensors["attention_mask"], tensors["mask"])
        (values**2).sum().backward()
        looking = case.model.critic.backbone if separate else case.model.base_model
        assert all(p.grad is not None and p.grad.any() for p in looking.get_input_embeddings().parameters())
        assert any(p.grad is not None and p.grad.any() for p in getattr(looking, EYES).looking_parameters(looking))
    finally:
        del case.model.critic
        case.model.zero_grad()
    for number, sample in enumerate(case.samples):
        states = case.own.base_model(**inputs(case, rows, number), use_cache=False).last_hidden_state[0]
        own = torch.nn.functional.linear(states, classifier.score.weight).squeeze(-1)
        length = len(sample.ids)
        wanted = torch.cat([own.new_zeros(1), own[:-1]]) * tensors["mask"][number, :length]
        torch.testing.assert_close(values[number, :length], wanted, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(scored.logits[number, 0], own[-1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", ["idefics3"], indirect=True)
def test_smolvlm_shares_too(case: Case) -> None:
    """Its processor wants a package that is not here; the model is Idefics3's, by another name."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    config = {key: value for key, value in case.model.config.to_dict().items() if key != "model_type"}
    config["vision_config"] = config["vision_config"] | {"model_type": "smolvlm_vision"}
    model = SmolVLMForConditionalGeneration._from_config(SmolVLMConfig(**config), dtype=torch.float64)
    open_eyes(model, case.renderer.tokenizer.pictures, 0, EVERYTHING)
    assert prove_scoring(model).way == "packed"


def test_completions_are_those_of_its_own_forward(case: Case, rows: Path) -> None:
    """Prompts of other lengths beside each other, two completions each, by a cache."""
    asked = [sample.ids[: sample.prompt_length] for sample in case.samples]
    assert sampling_way(case.model, 0) == "padded"
    engine = TransformersEngine(case.model, stop_ids=[2], pad_id=0, max_batch=8)
    done = engine.generate(asked, Sampling(n=2, max_new_tokens=6, temperature=1.0, seed=3))
    for number, completions in enumerate(done):
        made = inputs(case, rows, number)
        start = len(asked[number])
        for completion in completions:
            read = [0 if token == case.model.config.image_token_id else token for token in completion.ids]
            ids = torch.tensor([[*made["input_ids"][0, :start].tolist(), *read]])
            kept = {key: value for key, value in made.items() if key not in ("input_ids", "attention_mask")}
            types = {key: torch.zeros_like(ids) for key in kept if key.endswith("token_type_ids")}
            for key, value in types.items():
                value[0, :start] = kept[key][0, :start]
            logits = case.own(input_ids=ids, **kept | types, use_cache=False).logits
            logps = logits[0, start - 1 : -1].log_softmax(-1)
            wanted = logps.gather(-1, torch.tensor(completion.ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(completion.logps, dtype=wanted.dtype), wanted, rtol=1e-5, atol=1e-5)


def test_the_policys_own_token_of_pictures_stands_for_nothing(case: Case) -> None:
    """It may write the token by chance, and then no picture is missing."""
    token = case.model.config.image_token_id
    ids = torch.tensor([[*case.samples[2].ids, token, 5]])
    filler = torch.tensor([[*case.samples[2].ids, 0, 5]])
    assert torch.equal(case.model(input_ids=ids).logits, case.model(input_ids=filler).logits)


def test_an_adapter_is_on_the_language_model_alone(case: Case) -> None:
    from peft import get_peft_model

    config = lora_config(Lora(r=2))
    config.exclude_modules = frozen_modules(case.model, ["language"])
    language = {name.rpartition(".")[0] for name in parts(case.model)["language"]}
    adapted = get_peft_model(case.model, config)
    try:
        found = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
        assert found
        for name in found:
            assert name.removeprefix("base_model.model.").split(".lora_A")[0] in language
    finally:
        adapted.unload()


def test_parts_that_are_not_named_stay_as_they_are(tmp_path: Path) -> None:
    tiny_vlms.saved("idefics3", tmp_path)
    model, _ = load_policy(ModelConfig(path=str(tmp_path), pictures=PictureConfig(train=["projector"])), seed=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == parts(model)["projector"] != []


@pytest.mark.parametrize("case", ["qwen3_vl", "gemma3"], indirect=True)
def test_compute_is_counted_for_the_language_model_alone(case: Case) -> None:
    from peft import get_peft_model

    table = case.model.get_input_embeddings().weight
    language = sum(p.numel() for n, p in case.model.named_parameters() if n in parts(case.model)["language"])
    tied = case.model.get_output_embeddings().weight is table
    expected = language if tied else language - table.numel()
    assert size_of(case.model).parameters == expected
    config = lora_config(Lora(r=2))
    config.exclude_modules = frozen_modules(case.model, ["language"])
    adapted = get_peft_model(case.model, config)
    try:
        added = sum(p.numel() for n, p in adapted.named_parameters() if ".lora_" in n)
        assert size_of(adapted).parameters == expected + added and size_of(adapted).trained == added > 0
    finally:
        adapted.unload()


def test_a_text_model_reads_no_pictures(tmp_path: Path) -> None:
    from posttrain.models.initial import build_model
    from posttrain.models.tokenizer import build_tokenizer

    init = ModelInit()
    tokenizer = build_tokenizer(init.tokenizer, None)
    build_model(init, tokenizer, seed=0, dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="type 'llama' reads no pictures"):
        load_policy(ModelConfig(path=str(tmp_path), pictures=PictureConfig()), seed=0)


def test_a_model_loaded_as_one_of_text_says_so(rows: Path, tmp_path: Path) -> None:
    example = examples(FileSource(path=str(rows / "rows.jsonl"), images="images"), "rows")[0]
    _, processor = tiny_vlms.FAMILIES["idefics3"]()
    with pytest.raises(DataError, match="the model is loaded as one of text"):
        Renderer(processor.tokenizer).sample(example)


def test_model_init_makes_one_that_loads_again(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from posttrain.models.saving import SavePlan

    config = ModelConfig(init=ModelInit(hidden_size=16, layers=1), pictures=PictureConfig())
    (model, tokenizer), (again, _) = (load_policy(config, seed=1) for _ in range(2))
    for (name, mine), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(mine, other), name
    plan = SavePlan.of(config, model, tokenizer)
    plan.prove(["a text"])
    plan.write(tmp_path, model, model.state_dict())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    image = Image.new("RGB", (50, 20), (255, 0, 0))
    made = processor(text=["<image>What?"], images=[[image]], return_tensors="pt")
    assert int((made["input_ids"] == loaded.config.image_token_id).sum()) == 16
    assert loaded(**made).logits.isfinite().all()


def test_a_picture_as_the_model_sees_it(case: Case) -> None:
    """The middle of every tile or frame is that of the picture, scaled."""
    pictures = case.renderer.pictures
    seen = next(each for each in pictures.all_seen if each.picture.size == (40, 24) and not each.beside)
    image = pictures.as_seen(seen)
    whole = seen.picture.load()
    tile = image if image.height >= image.width * 0.55 else image.crop((0, 0, image.height, image.height))
    if case.model.config.model_type.startswith("qwen"):
        assert image.size == whole.size and list(image.getdata()) == list(whole.getdata())
    else:
        assert tile.size == (16, 16)
        assert abs(np.asarray(tile).mean() - np.asarray(whole).mean()) < 8


def test_a_frozen_tower_looks_at_a_picture_once(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_vlms.saved("qwen3_vl", tmp_path)
    model, tokenizer = load_policy(ModelConfig(path=str(tmp_path), pictures=PictureConfig()), seed=0)
    model.eval()
    example = examples(FileSource(path=str(rows / "rows.jsonl"), images="images"), "rows")[1]
    ids = torch.tensor([Renderer(tokenizer).sample(example).ids])
    looks = []
    own = model.base_model.get_image_features
    monkeypatch.setattr(model.base_model, "get_image_features", lambda *a, **k: looks.append(1) or own(*a, **k))
    first = model(input_ids=ids).logits
    assert looks == [1] and torch.equal(model(input_ids=ids).logits, first) and looks == [1]
    weight = next(p for name, p in model.named_parameters() if name in parts(model)["tower"])
    with torch.no_grad():
        weight.mul_(1.5)
    assert not torch.equal(model(input_ids=ids).logits, first) and looks == [1, 1]
    weight.requires_grad_(True)
    model(input_ids=ids).logits.sum().backward()
    model(input_ids=ids)
    assert looks == [1, 1, 1, 1] and weight.grad.abs().sum() > 0


def test_the_token_of_pictures_in_a_text_without_one_is_refused(case: Case) -> None:
    """Typed into a message it is text; in plain text it would stand for nothing."""
    from posttrain.data.sample import Example, Problem

    token = case.renderer.pictures.token
    typed = case.renderer.sample(Example(Problem("p", ({"role": "user", "content": f"what is {token}?"},)), "a word"))
    assert case.model.config.image_token_id not in typed.ids
    with pytest.raises(DataError, match="which stands for pictures alone"):
        case.renderer.prompt_ids(Problem("p", f"what is {token}?", chat=False))


def test_all_files_of_a_processor_are_fetched_before_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings of a processor missing a picture would take another number of tokens."""
    from posttrain.models import processor

    asked = []

    def fetched(config: ModelConfig, name: str, *, fetch: bool = False) -> None:
        asked.append((name, fetch))

    monkeypatch.setattr(processor, "start_file", fetched)
    for offline in (False, True):
        processor._settings(ModelConfig(path="owner/name", pictures=PictureConfig()), offline)
    assert asked == [(name, fetch) for fetch in (True, False) for name in processor.FILES]
