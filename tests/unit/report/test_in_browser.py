"""The page in a real browser: every view by clicks and keys, filters, phone, dark, and what a screen reader needs."""

from pathlib import Path

import pytest

from posttrain.report.collect import collect
from posttrain.report.page import page

ROOT = Path(__file__).resolve().parents[3]
AXE = ROOT / "build" / "axe" / "package" / "axe.min.js"
VIEWS = ["summary", "curves", "samples", "evaluations", "comparisons", "compute", "recipe"]
HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 2'>"
STATUS = "document.querySelector('[role=status]')?.textContent"


def write(path, *runs):
    path.write_text(page(collect(runs)), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path, make_run, make_report, make_samples):
    """Two runs, one with an alarm, samples and evaluations; what is foreign in them tries to act."""

    def values(step):
        return {"reward": step / 20, "accuracy": step / 20, "truncated_share": 0.9 if step > 5 else 0.0}

    evaluations = {0: make_report("step 0", "+-+-" * 5), 20: make_report("step 20", "++--" * 5)}
    samples = make_samples(240)
    samples[7] |= {"completion": HOSTILE, "problem": HOSTILE, "own": {"key": HOSTILE}}
    name = f"{'<img src=x onerror=window.hit=1>'}"
    first = make_run(tmp_path / name, values=values, samples=samples, evaluations=evaluations)
    second = make_run(tmp_path / "second", method="rloo", evaluations=evaluations)
    return write(tmp_path / "page.html", first, second)


def faults(page):
    """What axe-core, which the page has been given, finds serious or critical."""
    found = page.ask(
        "axe.run().then(found => found.violations.map(each => "
        "[each.impact, each.id, each.nodes.map(node => node.html.slice(0, 120))]))"
    )
    return [each for each in found if each[0] in ("serious", "critical")]


def shown(page):
    return page.ask("document.getElementById('panel').dataset.view.toLowerCase()")


def test_every_view_by_clicks(opened, file):
    page = opened(file)
    for view in VIEWS:
        page.click(f"#tab-{view}")
        assert shown(page) == view
        assert page.ask("document.getElementById('panel').innerText.length") > 100
    assert page.ask("window.hit") is None and not page.complaints


def test_every_view_by_keys(opened, file):
    page = opened(file)
    for number, view in enumerate(VIEWS, start=1):
        page.press(str(number))
        assert shown(page) == view
    page.press("ArrowRight")
    assert shown(page) == "summary"
    page.press("ArrowLeft")
    assert shown(page) == "recipe"
    page.press("3")
    page.press("j")
    chosen = "document.querySelector('[aria-selected=true].row').getAttribute('aria-posinset')"
    assert page.ask(chosen) == "2"
    page.press("k")
    assert page.ask(chosen) == "1"
    page.press("/")
    page.write("Completion 24:")
    page.wait(f"{STATUS} === '1 of 240 samples'")
    assert page.ask("[...document.querySelectorAll('mark')].map(each => each.innerText)") == ["Completion 24:"]
    assert page.ask("document.querySelector('.token').innerText") == "<|im_start|>"
    page.press("Escape")
    page.press("?")
    assert page.ask("document.getElementById('keys').open")
    assert not page.complaints


def test_filters_give_the_right_rows(opened, file, make_samples):
    samples = make_samples(240)
    page = opened(file)
    page.click("#tab-samples")
    right = sum(sample["verdict"] == "correct" for sample in samples)
    page.choose("Verdict", "correct")
    page.wait(f"{STATUS} === '{right} of 240 samples'")
    assert page.ask("[...document.querySelectorAll('.row')].every(row => row.innerText.includes('correct'))")
    page.click("[aria-label='First step']")
    page.write("30")
    late = sum(sample["verdict"] == "correct" and sample["step"] >= 30 for sample in samples)
    page.wait(f"{STATUS} === '{late} of 240 samples'")
    page.click("[aria-label='Least reward']")
    page.write("0.5")
    page.click("[aria-label='Largest reward']")
    page.write("0.9")
    page.wait(f"{STATUS} === '0 of 240 samples'")
    assert "Nothing fits" in page.ask("document.querySelector('.list').innerText")
    page.ask("[...document.querySelectorAll('button')].find(each => each.textContent === 'clear').click()")
    page.wait(f"{STATUS} === '240 of 240 samples'")
    page.choose("Sort", "step down")
    assert page.ask("document.querySelector('.row').innerText").startswith("step 59")


def test_groups_and_early_against_late(opened, file):
    page = opened(file)
    page.click("#tab-samples")
    page.choose("View", "groups")
    page.wait(f"{STATUS}.endsWith('61 rows')")  # 60, and the one whose problem has another name
    page.click(".row:nth-child(4)")
    assert "4 completions, mean reward" in page.ask("document.querySelector('.detail').innerText")
    page.choose("View", "change")
    page.wait(f"{STATUS}.endsWith('19 rows')")
    detail = page.ask("document.querySelector('.detail').innerText")
    assert "Early: step 0" in detail and "Late: step 50" in detail  # the last time that the problem came


def test_curves_over_each_axis_and_alarms(opened, file):
    page = opened(file)
    page.click("#tab-curves")
    count = page.ask("document.querySelectorAll('.charts canvas').length")
    assert count == 2  # reward and accuracy; lost completions
    for axis, last in (("tokens_trained_total", 2000), ("flops_total", 2e10), ("wall_seconds", 30)):
        page.choose("Over", axis)
        assert page.ask("document.querySelectorAll('.charts canvas').length") == count
        assert page.ask("charts[0].plot.data[0].at(-1)") == last
    assert "truncated_share high" in page.ask("document.getElementById('panel').innerText")
    page.click("summary")
    page.wait(f"document.querySelectorAll('.charts canvas').length > {count}")
    assert not page.complaints


def test_two_evaluations_side_by_side(opened, file):
    page = opened(file)
    page.click("#tab-evaluations")
    page.choose("Problems", "gained")
    page.wait("document.querySelectorAll('.list .row').length === 5")
    assert page.ask("document.querySelector('.list .row').innerText").startswith("sums/1")
    detail = page.ask("document.querySelector('.detail').innerText")
    assert "Written 1 by step 0" in detail and "Written 1 by step 20" in detail and "<b>What is 1?" in detail
    page.press("/")
    page.write("written 9 by")
    page.wait("document.querySelectorAll('.list .row').length === 1")


@pytest.fixture
def inside(tmp_path, make_run, make_samples, make_pairs, make_study):
    """A study, a run with the values of some tokens, and one of pairs."""
    values = {
        "trained": [1, 0, 1],
        "logp": [-0.5, None, -5.0],
        "ratio": [0.5, None, 2.0],
        "advantage": [1.0, None, -2.0],
    }
    tokens = {"step": 4, "rollout": 4, "place": 1, "text": ["two", " is ", "<b>right"], **values, "cut": 9}
    online = make_run(tmp_path / "online", samples=make_samples(40), tokens=[tokens])
    pairs = {"pairs/accuracy": 0.5, "pairs/margin": 1.0}
    held = [pair | {"held_out": 20} for pair in make_pairs(2)]
    dpo = make_run(tmp_path / "dpo", method="dpo", values=lambda step: pairs, tokens=[*make_pairs(20), *held])
    study = make_study(tmp_path / "arms", {"sft": [0.5, 0.52, 0.51, 0.53], "grpo": [0.2, 0.22, 0.21, 0.23]})
    return write(tmp_path / "inside.html", study, online, dpo)


INSIDE = ["summary", "study", "curves", "samples", "rows", "compute", "recipe"]


def test_a_sequence_token_by_token(opened, inside):
    page = opened(inside)
    page.click("#tab-samples")
    page.ask("[...document.querySelectorAll('label')].find(each => each.innerText === 'token by token').click()")
    page.wait(f"{STATUS} === '1 of 40 samples'")
    colours = "[...document.querySelectorAll('.inside span')].map(each => each.style.background)"
    blue, orange = (f"color-mix(in srgb, var(--{name}) {{}}%, transparent)" for name in ("c0", "c1"))
    assert page.ask(colours) == [orange.format(4), "", orange.format(38), ""]  # 45% for a log-prob of -6
    assert page.ask("document.querySelector('.inside').innerText") == "two is <b>right … 9 tokens more were not kept"
    page.choose("Colour by", "ratio")
    assert page.ask(colours) == [blue.format(23), "", orange.format(23), ""]
    page.choose("Colour by", "advantage")
    assert page.ask(colours) == [orange.format(23), "", blue.format(45), ""]
    assert "mean -0.5, sum -1" in page.ask("document.querySelector('.detail').innerText")
    page.ask("document.querySelector('.detail details').open = true")
    page.wait("document.querySelectorAll('.detail table').length === 1")
    cells = page.ask("[...document.querySelectorAll('.detail tbody tr:last-child td')].map(each => each.innerText)")
    assert cells == ['"<b>right"', "-5", "2", "-2", "1"]
    assert not page.complaints


def test_pairs_are_found_and_shown_side_by_side(opened, inside):
    page = opened(inside)
    page.click("#tab-rows")
    page.wait(f"{STATUS} === '22 of 22 rows'")
    page.choose("Rows", "held")
    page.wait(f"{STATUS} === '2 of 22 rows'")
    assert page.ask("document.querySelector('.row').innerText").startswith("held out, after 20 steps")
    page.choose("Rows", "trained")
    page.choose("Pairs", "chosen")
    page.wait(f"{STATUS} === '10 of 22 rows'")
    page.choose("Sort", "margin down")
    detail = page.ask("document.querySelector('.detail').innerText")
    assert (
        "chosen ahead" in detail
        and "margin 3 nats" in detail
        and "It good1<eos>" in detail
        and "It bad1<eos>" in detail
    )
    deep = (
        "[...document.querySelectorAll('.inside span')].map(each => each.style.background.match(/--c\\d\\) \\d+/)?.[0])"
    )
    assert page.ask(deep) == [None, "--c1) 45", "--c1) 4", None, "--c0) 45", "--c1) 4"]  # one scale for both
    page.press("/")
    page.write("bad7")
    page.wait(f"{STATUS} === '1 of 22 rows'")
    assert page.ask("document.querySelector('.token').innerText") == "<|user|>"
    assert not page.complaints


def test_a_study_answers_on_the_first_screen(opened, inside):
    page = opened(inside)
    first = page.ask("[...document.querySelectorAll('.finding')].map(each => each.innerText)")[0]
    assert "▲ Better: sft has the highest mean" in first and "sft is better than grpo by 30.0 points" in first
    assert page.ask("document.querySelector('.finding').getBoundingClientRect().bottom < innerHeight")
    page.click("#tab-study")
    text = page.ask("document.getElementById('panel').innerText")
    assert "▲ +30.0 [" in text and "▼ -30.0 [" in text and "training.learning_rate=0.003" in text
    for unit, last in (("tokens", 300), ("seconds", 30), ("flops", 3e9)):
        page.choose("Over", unit)
        assert page.ask("[charts.length, charts[0].plot.data[0].at(-1)]") == [1, last]
    assert not page.complaints


@pytest.mark.parametrize("look", [{}, {"width": 390, "height": 844}, {"dark": True}])
def test_the_views_of_what_is_inside_fit_and_are_open_to_all(opened, inside, look):
    page = opened(inside, **look)
    if AXE.is_file():
        page.ask(AXE.read_text(encoding="utf-8") + "; 0")
    for number, view in enumerate(INSIDE, start=1):
        page.press(str(number))
        assert shown(page) == view
        assert page.ask("document.documentElement.scrollWidth - innerWidth") <= 0, view
        assert not AXE.is_file() or not faults(page), view
    assert not page.complaints


def test_what_differs_between_recipes(opened, file):
    page = opened(file)
    page.click("#tab-recipe")
    page.click("input[type=checkbox]")
    keys = page.ask("[...document.querySelectorAll('tbody tr td:first-child')].map(cell => cell.innerText)")
    assert keys == ["method.name"]


@pytest.mark.parametrize(
    "look", [{"width": 390, "height": 844}, {"dark": True}, {"width": 390, "height": 844, "dark": True}]
)
def test_phone_and_dark(opened, file, look):
    page = opened(file, **look)
    for view in VIEWS:
        page.press(str(VIEWS.index(view) + 1))
        assert page.ask("document.documentElement.scrollWidth - innerWidth") <= 0, view
    background = page.ask("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is not look.get("dark", False)
    page.click("#theme")
    assert page.ask("getComputedStyle(document.body).backgroundColor") != background


def test_fifty_thousand_samples(opened, tmp_path, make_run, make_samples):
    samples = make_samples(50_000)
    page = opened(write(tmp_path / "page.html", make_run(tmp_path / "run", samples=samples)))
    page.click("#tab-samples")
    assert page.ask(STATUS) == "50,000 of 50,000 samples"
    assert page.ask("document.querySelectorAll('.row').length") < 60
    page.click(".list")
    page.press("End")
    assert "Completion 49999:" in page.ask("document.querySelector('.detail').innerText")
    page.press("/")
    page.write("Completion 4321")
    page.wait(f"{STATUS} === '11 of 50,000 samples'")


@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core: make axe")
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_no_serious_fault(opened, file, dark):
    page = opened(file, dark=dark)
    page.ask(AXE.read_text(encoding="utf-8") + "; 0")
    for view in VIEWS:
        page.press(str(VIEWS.index(view) + 1))
        assert not faults(page), view
