"""The page in a real browser: every view by clicks and keys, filters, phone, dark, and what a screen reader needs."""

import json
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
        found = page.ask(
            "axe.run().then(found => found.violations.map(each => "
            "[each.impact, each.id, each.nodes.map(node => node.html.slice(0, 120))]))"
        )
        assert not [each for each in found if each[0] in ("serious", "critical")], f"{view}: {json.dumps(found)}"
