"""The page of results: what it says, and of what."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from tests.bench.sample import pareto, run_record, write_raw, write_sample

from llmdoctor.bench.report.page import render_bench_report, write_plots
from llmdoctor.errors import UserError

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}</style>&lt;b&gt;"


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text, self.inside = set(), [], "", []
        self.feed(source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.inside.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.inside:
            self.text += data + " "


def assert_self_contained(source):
    """No scripts, no handlers, nothing that loads; links lead to arXiv only."""
    page = Page(source)
    assert not page.tags & {"script", "img", "iframe", "link", "object", "embed", "form"}
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "src"]
    links = [value for _, name, value in page.attributes if name == "href"]
    assert all(re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", link) for link in links)
    assert "url(" not in source
    assert "@import" not in source
    assert "default-src 'none'; style-src 'unsafe-inline'" in html.unescape(source)
    return page


def rendered(folder):
    return assert_self_contained(render_bench_report(folder).read_text())


def rewrite(folder, name, change):
    path = folder / f"{name}.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value)))


def changed(run, name, **changes):
    return {**run, f"{name}.json": {**run[f"{name}.json"], **changes}}


@pytest.fixture
def folder(tmp_path):
    return write_sample(tmp_path / "bench")


def test_the_headline_counts_verdicts_at_equal_kl(folder):
    """By the intervals at equal KL, without greedy (its KL is not matched) and LLMdoctor's own product form.

    Sentiment: six wins (temperature, top-p, ARGS, CARDS, GenARM, faces), two losses (best-of-n 40.8 to 47.6, DPO 42.8
    to 49.4), Transfer-Q* open (48.7 to 62.0). Readability: GenARM won; best-of-n and DPO open. 7 + 2 + 3 = 12.
    """
    page = rendered(folder)
    assert "At equal KL LLMdoctor wins 7 of 12 comparisons, loses 2 and leaves 3 undecided" in page.text
    assert "320 unseen prompts, 3 seeds, 2 tasks: sentiment, readability." in page.text
    sentiment = page.text[page.text.index("sentiment: at equal KL LLMdoctor") :]
    assert "leaves open Transfer-Q* 55 loses to best-of-n 44 DPO 46 KL unmatched † greedy 84" in sentiment


def test_one_task_is_told_by_name(folder):
    rewrite(folder, "table", lambda rows: [row for row in rows if row["task"] == "readability"])
    text = rendered(folder).text
    assert "At equal KL LLMdoctor beats GenARM, and is not told apart from best-of-n and DPO" in text


@pytest.mark.parametrize(
    ("low", "high", "word"), [(50.1, 60, "wins"), (50, 60, "open"), (40, 50, "open"), (40, 49.9, "loses")]
)
def test_a_verdict_needs_an_interval_without_one_half(folder, low, high, word):
    def change(rows):
        return [{**rows[0], "method": "dpo", "at": "equal_kl", "ci_low": low, "ci_high": high, "clamped": False}]

    rewrite(folder, "table", change)
    source = render_bench_report(folder).read_text()
    assert set(re.findall(r'<b class="(wins|open|loses)">', source)) == {word}


def test_the_table_shows_every_outcome_with_the_worst_first(folder):
    page = rendered(folder)
    table = page.text[page.text.index("Against At each one's best At equal KL") :]
    names = ("best-of-n", "DPO (policy at β = 1", "Transfer-Q*", "GenARM", "patient, sampled")
    order = [table.index(name) for name in names]
    assert order == sorted(order)
    assert "loses 44.2 % 40.8 to 47.6" in table
    assert "on 80 prompts only" in table
    assert "another form of LLMdoctor, no opponent" in table
    assert "https://arxiv.org/abs/2305.18290" in [value for _, name, value in page.attributes if name == "href"]
    titles = [value for _, name, value in page.attributes if name == "title"]
    assert "398 won, 52 tied, 510 lost" in titles


def test_a_method_with_fewer_seeds_says_so(folder):
    assert "seeds so far" not in rendered(folder).text
    rewrite(folder, "table", lambda rows: [{**row, "seeds": 1} if row["method"] == "dpo" else row for row in rows])
    assert len(re.findall("1 of 3 seeds so far", rendered(folder).text)) == 2


def test_costs_are_ranges_and_say_whose_they_are(folder):
    """Best-of-n passes the patient 2 to 8 times a token, at n = 2, 4, 8."""
    text = rendered(folder).text
    costs = text[text.index("What each method costs to run") :]
    assert "Timings are of this run's machine" in costs
    assert "best-of-n 206 2.00–8.00 0.00" in costs
    assert costs.index("patient 410") < costs.index("LLMdoctor 206"), "fastest first"


def test_examples_mark_guided_tokens_under_their_prompt(folder):
    """3.4 nats on "joyful" are e^3.4 = 30 times; six prompts a task are kept, three of them behind a fold."""
    page = rendered(folder)
    assert "Write a short review of a local jazz trio's evening set." in page.text
    tips = [value for _, name, value in page.attributes if name == "data-tip" and "joyful" in value]
    assert tips == ["␣joyful   guidance made it 30 times as likely (+3.4 nats)"] * 12
    assert page.text.count("Show 3 more") == 2
    assert "LLMdoctor · β = 2 · KL 11.2" in page.text
    assert page.text.count("cut at the length limit") == 0, "of the patient's many answers only the first is shown"


def test_prompts_that_changed_are_not_put_beside_answers_to_others(folder):
    rewrite(folder, "run", lambda run: changed(run, "table", prompts_hash="0" * 16))
    text = rendered(folder).text
    assert "The prompts have changed since: only their ids are shown." in text
    assert "jazz trio" not in text
    assert "art-and-music-05" in text


def test_a_smoke_run_says_so_before_anything_else(folder):
    write_sample(folder, quick=True)
    text = rendered(folder).text
    assert text.index("A smoke run.") < text.index("Smoke run, means nothing: At equal KL")
    assert "A smoke run." not in rendered(write_sample(folder)).text


def test_a_file_of_a_smoke_run_beside_others_is_named(folder):
    """The headline is the table's, which is none."""
    rewrite(folder, "run", lambda run: changed(run, "human", quick=True))
    text = rendered(folder).text
    assert "In part a smoke run: human.json. It shows that everything works" in text
    assert "none of their figures" in text
    assert "Smoke run, means nothing" not in text


def test_every_result_file_stands_with_what_it_was_made_from(folder):
    """Five files of one record together; the sources of the human labels with human.json and nowhere else."""
    text = rendered(folder).text
    origins = text[text.index("What these results were made from") :]
    groups = ["table.json, frontier.json, elo.json, pareto.json, ablation.json", "dynamics.json", "human.json"]
    places = [origins.index(group) for group in groups]
    assert places == sorted(places)
    assert origins.index("held-out.jsonl") > places[2]
    assert origins.count("held-out.jsonl") == 1
    assert "2 tasks: sentiment, readability." in text, "human labels are no task of the comparison"


def test_what_a_file_was_made_from_may_not_be_known(folder):
    """A record that is not there, and a run.json of the first schema, which did not say whose it was."""
    rewrite(folder, "run", lambda run: {name: record for name, record in run.items() if name != "elo.json"})
    assert "run.json does not say what these were made from: elo.json." in rendered(folder).text
    rewrite(folder, "run", lambda run: {**run_record(), "schema_version": 1})
    text = rendered(folder).text
    assert "run.json does not say what these results were made from." in text
    assert "run.json does not say which prompts table.json is about: only their ids are shown." in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must hold one object a result file"),
        ("{", "is broken"),
        (
            '{"table.json": {"schema_version": 3}}',
            "the record of table.json has schema version 3; this version reads 2",
        ),
    ],
)
def test_a_bad_record_of_the_run_ends_in_one_line(folder, content, message):
    (folder / "run.json").write_text(content)
    with pytest.raises(UserError, match=f"run\\.json.*{message}"):
        render_bench_report(folder)


@pytest.mark.parametrize("name", ["table", "frontier", "elo", "pareto", "ablation", "dynamics", "human", "run"])
def test_a_file_alone_or_missing_still_gives_a_page(folder, name, tmp_path):
    path = folder / f"{name}.json"
    if name != "run":
        alone = tmp_path / "alone"
        alone.mkdir()
        (alone / path.name).write_text(path.read_text())
        assert "No run.json here" in rendered(alone).text
    path.unlink()
    page = rendered(folder)
    assert f"No {name}.json here" in page.text
    assert f"Not in this folder: {name}.json." in page.text


def test_the_judges_agreement_with_people_is_told_where_it_was_measured(folder):
    """Both orders only of a judge that reads two answers; a missing file is no gap."""
    assert "The judge" not in rendered(folder).text
    found = {"judge": "chat:wise", "agreement": 71.3, "low": 64.5, "high": 77.9, "position_consistency": 83.0,
             "ties": 20, "unanswered": 3, "pairs": 200}  # fmt: skip
    (folder / "judge.json").write_text(json.dumps(found))
    told = "The judge chat:wise prefers what people chose in 71.3 % (64.5 to 77.9) of 200 labelled pairs"
    text = rendered(folder).text
    assert told in text
    assert "the same in both orders of presentation in 83.0 %. It gave no verdict on 3." in text
    (folder / "judge.json").write_text(json.dumps({**found, "position_consistency": None, "unanswered": 0}))
    text = rendered(folder).text
    assert told in text
    assert "both orders of presentation" not in text
    assert "no verdict" not in text
    (folder / "judge.json").write_text(json.dumps({**found, "low": "little"}))
    with pytest.raises(UserError, match=r"judge\.json: low must be a number, got 'little'"):
        render_bench_report(folder)


def test_no_results_or_broken_ones_end_in_one_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"holds no results; expected at least one of table\.json"):
        render_bench_report(tmp_path)
    rewrite(folder, "elo", lambda rows: [{**rows[0], "elo": "high"}])
    with pytest.raises(UserError, match=r"elo\.json row 1: elo must be a number, got 'high'"):
        render_bench_report(folder)
    rewrite(folder, "elo", lambda rows: [{**rows[0], "elo": float("nan")}])
    with pytest.raises(UserError, match="elo must be finite"):
        render_bench_report(folder)
    rewrite(folder, "elo", lambda rows: [{"task": "sentiment"}])
    with pytest.raises(UserError, match="row 1 lacks elo, high, low, method: written by another version"):
        render_bench_report(folder)
    (folder / "elo.json").write_text("[{")
    with pytest.raises(UserError, match=r"elo\.json is broken"):
        write_plots(folder, tmp_path / "plots")
    assert not (folder / "report.html").exists()
    assert not (tmp_path / "plots").exists()


def test_a_broken_raw_answer_is_named(folder):
    (folder / "raw/sentiment/dpo/beta=1.5-seed0.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match=r"beta=1\.5-seed0\.jsonl\.gz is broken"):
        render_bench_report(folder)


def test_what_cannot_be_drawn_is_said(folder):
    def change(rows):
        return [{**row, "kl": float("inf")} if row["method"] == "greedy" else row for row in rows]

    rewrite(folder, "frontier", change)
    assert "Not drawn, for want of a finite figure: greedy." in rendered(folder).text


def test_an_ablation_says_what_the_part_was_worth(folder):
    """Of every variant but the whole doctor."""
    source = render_bench_report(folder).read_text()
    parts = [row for row in json.loads((folder / "ablation.json").read_text()) if row["of"]]
    assert source.count(" has 61.5 % (58.1 to 64.9) against it") == len(parts) == 20


def test_an_ablation_of_another_base_says_so(folder):
    assert "Trained from" not in rendered(folder).text
    rewrite(folder, "run", lambda run: changed(run, "ablation", options={"base": "runs/small"}))
    assert "Trained from runs/small. One line a variant" in rendered(folder).text


def test_hostile_text_is_only_text(folder):
    """A method, variant, task, setting or answer that tries to break out of the page stays text."""
    rewrite(folder, "frontier", lambda rows: [{**rows[0], "method": HOSTILE, "setting": {HOSTILE: 1}}])
    rewrite(folder, "elo", lambda rows: [{**rows[0], "method": HOSTILE, "task": HOSTILE}])
    rewrite(folder, "ablation", lambda rows: [{**rows[0], "variant": HOSTILE}])
    rewrite(folder, "run", lambda run: changed(run, "table", commit=HOSTILE, options={}))
    write_raw(folder, "sentiment", "llmdoctor", "beta=2", HOSTILE, [HOSTILE], 1.0)
    page = rendered(folder)
    assert page.text.count("<script>alert(1)</script>") >= 5
    for path in write_plots(folder, folder / "plots"):
        assert "<script" not in path.read_text()
        ElementTree.parse(path)


def test_hypervolumes_of_a_strength_stand_below_those_of_all(folder):
    text = rendered(folder).text
    assert text.index("MOD 6.96") < text.index("LLMdoctor, strength 3 7.11") < text.index("MOD, strength 1 5.55")
    path = folder / "pareto.json"
    # Written by an earlier version.
    path.write_text(json.dumps({key: value for key, value in pareto().items() if key != "by_strength"}))
    assert "strength 3 7.11" not in rendered(folder).text


def test_no_name_beside_a_curve_is_cut_off(folder, tmp_path):
    """Some are as long as LLMdoctor, pairs: in bold, some nine units a letter."""
    rewrite(folder, "dynamics", lambda rows: [*rows, {**rows[0], "method": "llmdoctor_pairs"}])
    (path,) = (path for path in write_plots(folder, tmp_path / "plots") if path.name == "dynamics-sentiment.svg")
    root = ElementTree.parse(path).getroot()
    names = [
        text for text in root.iter("{http://www.w3.org/2000/svg}text") if text.get("class", "").startswith("name ")
    ]
    assert len(names) == 4
    assert all(float(text.get("x")) + 8.6 * len(text.text) <= float(root.get("width")) for text in names)


def test_plots_stand_alone_on_white(folder, tmp_path):
    paths = write_plots(folder, tmp_path / "plots")
    names = {path.name for path in paths}
    assert {"table-sentiment.svg", "frontier-sentiment-kl.svg", "frontier-readability-diversity.svg", "pareto.svg",
            "hypervolume.svg", "ablation-sentiment.svg", "dynamics-sentiment.svg", "elo-readability.svg", "human.svg",
            "human-difference.svg"} <= names  # fmt: skip
    assert len(names) == len(paths)
    for path in paths:
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find("{http://www.w3.org/2000/svg}rect").get("fill") == "#fff"
        source = path.read_text()
        assert "nan" not in source
        assert source.count("http") == 1, "nothing but the name space"


def test_tasks_whose_names_make_one_file_name_get_two(folder, tmp_path):
    rewrite(folder, "run", lambda run: {})
    for name in ("table", "frontier", "ablation", "dynamics"):
        (folder / f"{name}.json").unlink()
    rewrite(folder, "elo", lambda rows: [{**rows[0], "task": "A b"}, {**rows[0], "task": "a-b"}])
    names = [path.name for path in write_plots(folder, tmp_path)]
    assert [name for name in names if name.startswith("elo")] == ["elo-a-b.svg", "elo-a-b-2.svg"]


def test_the_same_results_give_the_same_page(folder):
    assert render_bench_report(folder).read_bytes() == render_bench_report(folder).read_bytes()
