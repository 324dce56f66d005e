from __future__ import annotations

import json

import pytest

from posttrain.config.schema import FileSource, GymSource, TaskSource
from posttrain.data.sources import examples, is_local, problems
from posttrain.errors import DataError, RecipeError

MESSAGES = [{"role": "user", "content": "1+1?"}]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def source(tmp_path):
    """`source(rows, **keys)` writes the rows and names them in a source section."""

    def make(*rows: dict, **keys) -> FileSource:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return FileSource(path=str(path), **keys)

    return make


def test_problems(source):
    rows = [{"question": f"q{i}", "answer": f"so #### {i}", "level": i} for i in range(3)]
    made = problems(
        source(*rows, prompt="question", reference="answer", reference_pattern="#### (.+)", limit=2), "prompts"
    )
    assert [problem.id for problem in made] == ["prompts/0", "prompts/1"]
    assert [problem.prompt for problem in made] == ["q0", "q1"]
    assert [problem.reference for problem in made] == ["0", "1"]
    # With a pattern the whole reference column stays at hand.
    assert made[1].meta == {"answer": "so #### 1", "level": 1}
    assert made[1].where.endswith("rows.jsonl:2") and made[1].chat is None


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("72", "72"),
        (" 72", " 72"),
        (72, "72"),
        (-3, "-3"),
        (27.0, "27"),
        (0.2, "0.2"),
        (1e20, "1" + "0" * 20),
        (["$4$"], "$4$"),
        (["1", "2"], "1, 2"),
    ],
)
def test_references(source, raw, expected):
    assert problems(source({"prompt": "q", "gold": raw}, reference="gold"), "p")[0].reference == expected


@pytest.mark.parametrize(
    ("pattern", "raw", "expected"),
    [
        ("#### (.+)", "a #### 1\nb #### 2 ", "2"),
        (r"(\d+)|x", "1 x 2 x", "2"),
        (r"(?:a|(b)) (\w)", "b z a y", "b"),
        ("(.+)", 12.0, "12"),
    ],
)
def test_reference_pattern_takes_the_first_group_of_the_last_match(source, pattern, raw, expected):
    made = problems(source({"prompt": "q", "gold": raw}, reference="gold", reference_pattern=pattern), "p")
    assert made[0].reference == expected


@pytest.mark.parametrize(
    ("keys", "prompt", "chat"),
    [
        ({}, "1+1?", None),
        ({"chat": True}, "1+1?", True),
        ({"chat": False}, "1+1?", False),
        ({"system": "Be brief."}, (SYSTEM, *MESSAGES), None),
        ({"system": "Be brief.", "chat": True}, (SYSTEM, *MESSAGES), True),
        ({"prompt": "turns"}, tuple(MESSAGES), None),
        ({"prompt": "turns", "system": "Be brief."}, (SYSTEM, *MESSAGES), None),
        ({"template": "Q: {prompt}\nA:"}, "Q: 1+1?\nA:", None),
        ({"template": "{{{unit}}} {n} {f}", "prompt": "prompt"}, "{cm} 7 2", None),
        ({"template": "{prompt}", "prompt": "other"}, "1+1?", None),
        ({"template": "{prompt}!", "system": "Be brief."}, (SYSTEM, {"role": "user", "content": "1+1?!"}), None),
    ],
)
def test_prompts(source, keys, prompt, chat):
    row = {"prompt": "1+1?", "other": "2+2?", "turns": MESSAGES, "unit": "cm", "n": 7, "f": 2.0}
    made = problems(source(row, **keys), "p")[0]
    assert (made.prompt, made.chat) == (prompt, chat)


def test_template_without_a_prompt_column(source):
    rows = {"Body": "Ed has 3.", "Question": "How many?"}
    assert problems(source(rows, template="{Body} {Question}"), "p")[0].prompt == "Ed has 3. How many?"
    assert problems(source(rows, template="{prompt}!", prompt="Body"), "p")[0].prompt == "Ed has 3.!"


BAD_ROWS = [
    # second row, keys, place behind the file, part of the message
    ({"prmpt": "q"}, {}, ":2", "no column 'prompt'; columns: prmpt\n  did you mean 'prmpt'"),
    ({"prompt": None}, {}, ":2, column 'prompt'", "null"),
    ({"prompt": " \n"}, {}, ":2, column 'prompt'", "empty"),
    ({"prompt": 7}, {}, ":2, column 'prompt'", "must be text, not int"),
    ({"prompt": "\ud800"}, {}, ":2, column 'prompt'", "surrogate"),
    ({"prompt": []}, {}, ":2, column 'prompt'", "the list of messages is empty"),
    ({"prompt": ["hi"]}, {}, ":2, column 'prompt', message 0", "must be an object"),
    ({"prompt": [{"role": "user"}]}, {}, ":2, column 'prompt', message 0", "needs `content`"),
    ({"prompt": [{"from": "human", "text": "x"}]}, {}, ":2, column 'prompt', message 0", "needs `role`; keys: from"),
    ({"prompt": [{"role": "usr", "content": "x"}]}, {}, ":2, column 'prompt', message 0", "did you mean 'user'"),
    (
        {"prompt": [{"role": "user", "content": None}]},
        {},
        ":2, column 'prompt', message 0",
        "must be text, not NoneType",
    ),
    (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        {},
        ":2, column 'prompt', message 0, part 0",
        "a part of type 'image'; only text can be trained on",
    ),
    ({"prompt": [{"role": "user", "content": ""}]}, {}, ":2, column 'prompt'", "last message of the prompt is empty"),
    ({"prompt": [SYSTEM]}, {}, ":2, column 'prompt'", "ends with a system message"),
    ({"prompt": [SYSTEM, *MESSAGES]}, {"system": "x"}, ":2, column 'prompt'", "a system message of its own"),
    ({"prompt": MESSAGES}, {"chat": False}, ":2, column 'prompt'", "`chat: false` cannot be used"),
    ({"prompt": MESSAGES}, {"template": "{prompt}", "prompt": "prompt"}, ":2, column 'prompt'", "`template` cannot be"),
    ({"prompt": "q"}, {"reference": "gold"}, ":2", "no column 'gold'; columns: prompt"),
    ({"prompt": "q", "gold": None}, {"reference": "gold"}, ":2, column 'gold'", "null"),
    ({"prompt": "q", "gold": ""}, {"reference": "gold"}, ":2, column 'gold'", "empty"),
    ({"prompt": "q", "gold": True}, {"reference": "gold"}, ":2, column 'gold'", "not bool"),
    ({"prompt": "q", "gold": []}, {"reference": "gold"}, ":2, column 'gold'", "not list"),
    ({"prompt": "q", "gold": ["1", 2]}, {"reference": "gold"}, ":2, column 'gold'", "must be text, not int"),
    ({"prompt": "q", "gold": float("nan")}, {"reference": "gold"}, ":2, column 'gold'", "is nan"),
    (
        {"prompt": "q", "gold": "none"},
        {"reference": "gold", "reference_pattern": "#### (.+)"},
        ":2, column 'gold'",
        "finds no answer in 'none'",
    ),
    ({"prompt": "q"}, {"template": "{prompt} {gold}"}, ":2", "names 'gold'; columns: prompt"),
    ({"prompt": "q", "gold": None}, {"template": "{prompt} {gold}"}, ":2, column 'gold'", "null"),
    ({"prompt": "q", "gold": {}}, {"template": "{prompt} {gold}"}, ":2, column 'gold'", "takes text and numbers"),
]


@pytest.mark.parametrize(("row", "keys", "place", "message"), BAD_ROWS)
def test_bad_rows_are_named(source, row, keys, place, message):
    section = source({"prompt": "q", "gold": "#### 1"}, row, **keys)
    with pytest.raises(DataError) as error:
        problems(section, "p")
    assert message in str(error.value)
    assert error.value.where == section.path + place


@pytest.mark.parametrize(
    ("keys", "where", "message"),
    [
        ({"template": "{prompt} {"}, "p.template", "single '{' at character 9"),
        ({"template": "{prompt} }"}, "p.template", "single '}'"),
        ({"template": "Solve it."}, "p.template", "names no column"),
        ({"template": "{{prompt}}"}, "p.template", "names no column"),
        ({"reference_pattern": "(a)"}, "p.reference_pattern", "no effect without `reference`"),
        ({"reference": "gold", "reference_pattern": "("}, "p.reference_pattern", "not a regular expression"),
        ({"reference": "gold", "reference_pattern": "a+"}, "p.reference_pattern", "no group"),
        ({"system": "x", "chat": False}, "p.system", "forbids it"),
        ({"split": "test"}, "p.split", "no effect on a local file"),
        ({"name": "main"}, "p.name", "no effect on a local file"),
        ({"revision": "v1"}, "p.revision", "no effect on a local file"),
    ],
)
def test_bad_keys(source, keys, where, message):
    with pytest.raises(RecipeError) as error:
        problems(source({"prompt": "q", "gold": "a"}, **keys), "p")
    assert message in str(error.value)
    assert error.value.where == where


def test_a_template_keeps_the_prompt_column_for_verifiers(source):
    row = {"prompt": "def f():", "test": "assert f()"}
    made = problems(source(row, template="Write it:\n{prompt}", prompt="prompt"), "p")[0]
    assert made.prompt == "Write it:\ndef f():" and made.meta == row
    assert problems(source(row, prompt="prompt"), "p")[0].meta == {"test": "assert f()"}


def test_a_template_writes_a_list_of_texts_as_lines(source):
    made = problems(source({"prompt": "q", "tests": ["a", "b"]}, template="{prompt}\n{tests}"), "p")
    assert made[0].prompt == "q\na\nb"


def test_template_gives_no_access_to_attributes(source):
    with pytest.raises(DataError, match="names 'prompt.__class__'"):
        problems(source({"prompt": "q"}, template="{prompt.__class__}"), "p")


def test_examples(source):
    reply = [{"role": "assistant", "content": "2", "name": None}]
    made = examples(source({"prompt": "1+1?", "done": "2"}, completion="done"), "c")
    assert (made[0].problem.prompt, made[0].completion, made[0].problem.meta) == ("1+1?", "2", {})
    made = examples(source({"prompt": MESSAGES, "done": reply}, completion="done"), "c")
    assert made[0].completion == ({"role": "assistant", "content": "2"},)


@pytest.mark.parametrize(
    ("done", "keys", "message"),
    [
        ("", {}, "empty"),
        (None, {}, "null"),
        (3, {}, "must be text, not int"),
        ([{"role": "assistant", "content": " "}], {}, "assistant message 0 is empty"),
        (MESSAGES, {}, "the first message of a completion must be the assistant's"),
        ([{"role": "assistant", "content": "2"}, *MESSAGES], {}, "the last message of a completion"),
        ([{"role": "assistant", "content": "2"}], {"chat": False}, "`chat: false`, but the completion is chat"),
    ],
)
def test_bad_completions(source, done, keys, message):
    section = source({"prompt": "q", "done": done}, completion="done", **keys)
    with pytest.raises(DataError) as error:
        examples(section, "c")
    assert message in str(error.value)
    assert error.value.where.startswith(f"{section.path}:1, column 'done'")


def test_sources_without_completions(source):
    with pytest.raises(DataError, match="nothing says which column holds the completions; columns: prompt, solution"):
        examples(source({"prompt": "q", "solution": "a"}), "c")
    with pytest.raises(RecipeError, match="write no solutions"):
        examples(GymSource(reasoning_gym="chain_sum", size=1), "c")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("openai/gsm8k", False),
        ("gsm8k", False),
        ("train.jsonl", True),
        ("owner/train.json.gz", True),
        ("./gsm8k", True),
        ("~/gsm8k", True),
        ("/data/gsm8k", True),
        ("a/b/c", False),
    ],
)
def test_local_or_hub(path, expected):
    assert is_local(path) is expected


def test_what_exists_is_local(source, tmp_path, monkeypatch):
    source({"prompt": "q"})
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "rows.jsonl").rename(tmp_path / "owner" / "name" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    assert problems(FileSource(path="owner/name", split="train"), "p")[0].prompt == "q"


def test_neither_file_nor_hub_id():
    with pytest.raises(DataError, match="neither a file or folder here nor a Hub id"):
        problems(FileSource(path="a/b/c"), "p")


def test_hub_rows_that_cannot_be_had():
    with pytest.raises(DataError, match="not in the local cache"):
        problems(FileSource(path="nobody-here/nothing"), "p", offline=True)


def test_tasks_and_gym_are_dispatched():
    task = TaskSource(task="chain_sum", levels=[2], size=3)
    assert [problem.id for problem in problems(task, "p")] == ["p/0", "p/1", "p/2"]
    assert examples(task, "c")[0].completion
    made = problems(GymSource(reasoning_gym="chain_sum", size=2, chat=False), "g")
    assert [(problem.id, problem.chat) for problem in made] == [("g/0", False), ("g/1", False)]
    with pytest.raises(RecipeError, match="forbids it"):
        problems(GymSource(reasoning_gym="chain_sum", size=1, chat=False, system="x"), "g")


@pytest.mark.parametrize(
    ("file", "keys", "rows", "reference"),
    [
        (
            "gsm8k_train.jsonl",
            {"prompt": "question", "reference": "answer", "reference_pattern": r"#### (.+)", "completion": "answer"},
            7473,
            "72",
        ),
        ("svamp.jsonl", {"template": "{Body} {Question}", "reference": "Answer"}, 1000, "145"),
        ("amc23.jsonl", {"prompt": "problem", "reference": "answer"}, 40, "27"),
    ],
)
def test_real_files(test_data, file, keys, rows, reference):
    made = problems(FileSource(path=str(test_data / file), **keys), "p")
    assert (len(made), made[0].reference) == (rows, reference)
    assert all("." not in problem.reference or float(problem.reference) % 1 for problem in made)
