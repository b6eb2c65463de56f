from __future__ import annotations

import gzip
import html
import itertools
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from llmdoctor.bench.methods import CONTENDERS
from llmdoctor.bench.report.charts import Bar, Series, Spot, frontier, intervals
from llmdoctor.bench.report.looks import look
from llmdoctor.bench.report.page import render_bench_report, write_plots
from llmdoctor.data.prompts import load_prompts
from llmdoctor.errors import UserError
from llmdoctor.evaluation.metrics import Interval
from llmdoctor.evaluation.plot import Plot, ticks
from llmdoctor.files import digest

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}</style>&lt;b&gt;"
TASKS = ("sentiment", "readability")

# task -> method -> per setting (knob, score, KL, distinct-4). The scale of the second task is grade levels.
CURVES = {
    "sentiment": {
        "llmdoctor": [(0.5, 0.42, 1.1, 0.997), (1, 0.61, 3.6, 0.996), (1.5, 0.74, 7.0, 0.995), (2, 0.82, 11.2, 0.992),
                      (3, 0.90, 19.5, 0.971)],
        "llmdoctor_product": [(0.5, 0.37, 6.8, 0.97), (1, 0.44, 13.9, 0.92), (2, 0.55, 23.0, 0.85)],
        "patient": [(None, 0.224, 0.0, 0.998)],
        "greedy": [(None, 0.31, 31.8, 0.83)],
        "temperature": [(None, 0.27, 8.3, 0.981)],
        "top_k": [(None, 0.24, 2.1, 0.994)],
        "top_p": [(None, 0.25, 3.2, 0.992)],
        "contrastive": [(None, 0.28, 28.4, 0.89)],
        "best_of_n": [(2, 0.36, 0.19, 0.998), (4, 0.49, 0.64, 0.997), (8, 0.58, 1.2, 0.997)],
        "args": [(0.5, 0.45, 34.0, 0.86), (1.5, 0.62, 41.6, 0.81)],
        "args_stochastic": [(1, 0.40, 4.9, 0.994), (3, 0.66, 15.7, 0.983)],
        "cards": [(0.7, 0.55, 9.6, 0.978)],
        "transfer_q": [(1, 0.59, 9.0, 0.99)],
        "genarm": [(0.25, 0.46, 4.9, 0.985), (0.5, 0.60, 8.8, 0.962), (1, 0.75, 15.8, 0.87), (2, 0.83, 26.9, 0.74)],
        "faces": [(0.5, 0.38, 2.9, 0.995), (1, 0.52, 8.1, 0.99), (2, 0.71, 21.9, 0.951)],
        "dpo": [(0.5, 0.51, 1.9, 0.995), (1, 0.72, 5.6, 0.985), (1.5, 0.84, 10.6, 0.967), (2, 0.90, 16.2, 0.948)],
    },
    "readability": {
        "llmdoctor": [(0.5, 68.1, 0.9, 0.997), (1, 73.5, 2.8, 0.994), (1.5, 78.2, 5.4, 0.991), (2, 82.0, 8.5, 0.984),
                      (3, 86.4, 15.3, 0.957)],
        "patient": [(None, 62.9, 0.0, 0.998)],
        "greedy": [(None, 61.0, 32.4, 0.84)],
        "best_of_n": [(2, 67.5, 0.19, 0.998), (4, 71.8, 0.64, 0.997), (8, 75.0, 1.2, 0.997)],
        "genarm": [(0.25, 70.2, 4.4, 0.981), (0.5, 75.0, 8.0, 0.954), (1, 80.7, 14.9, 0.86), (2, 84.1, 25.5, 0.73)],
        "dpo": [(0.5, 69.4, 1.6, 0.995), (1, 76.3, 4.8, 0.983), (1.5, 81.1, 9.3, 0.962), (2, 84.8, 14.1, 0.94)],
    },
}  # fmt: skip

# task -> method -> (win, tie, loss, win + ½tie, low, high) of LLMdoctor at best, then at equal KL.
OUTCOMES = {
    "sentiment": {
        "patient": ((872, 19, 69, 91.8, 89.7, 93.7), None),
        "greedy": ((771, 30, 159, 81.9, 79.0, 84.7), (790, 25, 145, 83.6, 80.9, 86.1)),
        "temperature": ((801, 22, 137, 84.6, 82.1, 87.0), (760, 28, 172, 80.6, 77.8, 83.4)),
        "top_p": ((815, 20, 125, 85.9, 83.5, 88.2), (688, 31, 241, 73.3, 70.2, 76.3)),
        "best_of_n": ((561, 40, 359, 60.5, 57.2, 63.8), (398, 52, 510, 44.2, 40.8, 47.6)),
        "args_stochastic": ((534, 47, 379, 58.1, 54.7, 61.4), (541, 43, 376, 58.6, 55.3, 61.9)),
        "cards": ((601, 39, 320, 64.6, 61.3, 67.9), (588, 40, 332, 63.3, 60.0, 66.6)),
        "transfer_q": ((141, 11, 88, 61.0, 54.6, 67.3), (127, 12, 101, 55.4, 48.7, 62.0)),
        "genarm": ((520, 51, 389, 56.8, 53.4, 60.1), (577, 44, 339, 62.4, 59.1, 65.6)),
        "faces": ((617, 38, 305, 66.3, 63.0, 69.5), (575, 45, 340, 62.2, 58.9, 65.5)),
        "dpo": ((431, 60, 469, 48.0, 44.6, 51.4), (412, 61, 487, 46.1, 42.8, 49.4)),
        "llmdoctor_product": ((700, 33, 227, 74.6, 71.6, 77.6), (690, 30, 240, 73.4, 70.4, 76.4)),
    },
    "readability": {
        "patient": ((830, 2, 128, 86.6, 84.2, 88.8), None),
        "greedy": ((822, 1, 137, 85.7, 83.3, 88.0), (835, 3, 122, 87.1, 84.8, 89.3)),
        "best_of_n": ((590, 6, 364, 61.8, 58.5, 65.0), (455, 4, 501, 47.6, 44.3, 51.0)),
        "genarm": ((540, 3, 417, 56.4, 53.0, 59.7), (579, 5, 376, 60.6, 57.3, 63.8)),
        "dpo": ((488, 4, 468, 51.0, 47.7, 54.4), (474, 6, 480, 49.7, 46.3, 53.0)),
    },
}  # fmt: skip
CLAMPED = {"greedy"}
KNOBS = {"best_of_n": "n", "args": "weight", "args_stochastic": "weight", "cards": "temperature",
         "transfer_q": "strength"}  # fmt: skip


def setting_of(method, knob):
    return {} if knob is None else {KNOBS.get(method, "beta"): knob}


def frontier_rows():
    rows = []
    for task, methods in CURVES.items():
        wide = 0.03 if task == "sentiment" else 1.4
        for method, curve in methods.items():
            for knob, score, kl, distinct in curve:
                rows.append(
                    {
                        "task": task,
                        "method": method,
                        "setting": setting_of(method, knob),
                        "score": score,
                        "score_low": score - wide,
                        "score_high": score + wide,
                        "kl": kl,
                        "kl_low": kl * 0.94,
                        "kl_high": kl * 1.06,
                        "distinct_1": 0.3,
                        "distinct_2": 0.8,
                        "distinct_3": 0.95,
                        "distinct_4": distinct,
                        "self_bleu": 0.2,
                        "self_bleu_within": 0.3 if task == "sentiment" else None,
                        "pairwise_distance": None,
                        "perplexity": 20.0 - kl / 3,
                        "tokens_per_second": 410.0 if method == "patient" else 205.5,
                        "patient_forwards_per_token": float(knob) if method == "best_of_n" else 1.0,
                        "guide_forwards_per_token": 1.0 if "llm" in method else 0.0,
                        "prompts": 320,
                        "seeds": 3,
                    }
                )
    return rows


def table_rows():
    rows = []
    for task, methods in OUTCOMES.items():
        for method, pair in methods.items():
            for at, outcome in zip(("best", "equal_kl"), pair, strict=True):
                if outcome is None:
                    continue
                win, tie, loss, mean, low, high = outcome
                curve = CURVES[task].get(method, CURVES["sentiment"]["patient"])
                knob, score, kl, distinct = curve[len(curve) // 2]
                clamped = at == "equal_kl" and method in CLAMPED
                rows.append(
                    {
                        "task": task,
                        "method": method,
                        "at": at,
                        "win": win,
                        "tie": tie,
                        "loss": loss,
                        "win_plus_half_tie": mean,
                        "ci_low": low,
                        "ci_high": high,
                        "score": score,
                        "distinct_4": distinct,
                        "kl": kl,
                        "tokens_per_second": 205.5,
                        "prompts": 80 if method == "transfer_q" else 320,
                        "seeds": 3,
                        "sign_test_p": 0.0004 if low > 50 else 0.31,
                        "prompts_needed": None if method == "dpo" else 120,
                        "settings": [setting_of(method, knob)],
                        "doctor_settings": [{"beta": 2}, {"beta": 3}] if at == "best" else [{"beta": 1}, {"beta": 1.5}],
                        "doctor_score": 0.82,
                        "doctor_kl": 19.5 if clamped else kl,
                        "doctor_distinct_4": 0.97,
                        "clamped": clamped,
                        "keeps_text": method != "contrastive",
                        "doctor_keeps_text": at == "best" or method != "dpo",
                        "by_seed": [mean - 1, mean, mean + 1],
                    }
                )
    return rows


def elo_rows():
    places = [("dpo", 1342), ("llmdoctor", 1331), ("genarm", 1290), ("args_stochastic", 1275), ("best_of_n", 1262),
              ("cards", 1230), ("faces", 1210), ("transfer_q", 1205), ("greedy", 1071), ("contrastive", 1050),
              ("temperature", 1032), ("top_p", 1018), ("top_k", 1010), ("patient", 1000)]  # fmt: skip
    return [
        {"task": task, "method": method, "elo": elo, "low": elo - wide, "high": elo + wide}
        for task in TASKS
        for method, elo in places
        for wide in [0 if method == "patient" else 17]
    ]


def pareto():
    scores = {
        "llmdoctor": [(0.38, 76.9), (0.47, 74.2), (0.58, 69.0), (0.51, 83.0), (0.64, 79.5), (0.76, 72.1)],
        "reward_soup": [(0.33, 72.5), (0.42, 71.0), (0.55, 66.4), (0.44, 77.0), (0.56, 74.8), (0.70, 68.3)],
        "mod": [(0.35, 73.9), (0.45, 72.2), (0.57, 67.0), (0.47, 79.4), (0.60, 76.2), (0.735, 69.0)],
    }
    return {
        "tasks": list(TASKS),
        "reference": [0.224, 62.9],
        "points": [
            {
                "method": method,
                "setting": {"share": (0.25, 0.5, 0.75)[place % 3], "strength": 1.0 + place // 3},
                "scores": list(pair),
                "kl": 3.0 + 4 * (place // 3),
                "distinct_4": 0.99,
                "on_front": place >= 3,
            }
            for method, pairs in scores.items()
            for place, pair in enumerate(pairs)
        ],
        "hypervolume": {
            "llmdoctor": {"value": 8.91, "low": 8.2, "high": 9.6},
            "reward_soup": {"value": 5.60, "low": 5.0, "high": 6.2},
            "mod": {"value": 6.96, "low": 6.3, "high": 7.6},
        },
        "by_strength": [
            {"method": "llmdoctor", "strength": 3.0, "value": 7.11, "low": 6.6, "high": 7.7},
            {"method": "mod", "strength": 1.0, "value": 5.55, "low": 5.1, "high": 6.0},
        ],
        "prompts": 320,
        "seeds": 3,
    }


def ablation_rows():
    variants = {
        "whole": ((0.61, 3.6), (0.82, 11.2)),
        "no_subtb": ((0.26, 0.7), (0.29, 2.3)),
        "pairs_no_value": ((0.59, 3.4), (0.80, 10.9)),
        "pairs_no_sparsity": ((0.60, 3.9), (0.81, 11.9)),
        "no_flow": ((0.33, 1.2), (0.44, 4.6)),
        "pairs_no_anchor": ((0.22, 0.4), (0.21, 1.6)),
    }
    return [
        {
            "task": task,
            "variant": variant,
            "beta": beta,
            "score": score,
            "score_low": score - 0.03,
            "score_high": score + 0.03,
            "kl": kl,
            "distinct_4": 0.99,
            "perplexity": 18.2,
            "prompts": 320,
            "seeds": 3,
        }
        for task in TASKS
        for variant, points in variants.items()
        for beta, (score, kl) in zip((1.0, 2.0), points, strict=True)
    ]


def dynamics_rows():
    steps = [step / 20 for step in range(21)]
    rows = []
    for task in TASKS:
        for method, end, bend in (("llmdoctor", 0.83, 0.7), ("genarm", 0.71, 1.0), ("dpo", 0.79, 0.85)):
            mean = [end * step**bend for step in steps]
            rows.append(
                {
                    "task": task,
                    "method": method,
                    "positions": steps,
                    "mean": mean,
                    "low": [value - 0.09 * step for value, step in zip(mean, steps, strict=True)],
                    "high": [value + 0.09 * step for value, step in zip(mean, steps, strict=True)],
                    "scale": 12.5,
                    "pairs": 200,
                }
            )
    return rows


def human_rows():
    figures = {"llmdoctor": (57.4, 0.0), "genarm": (56.1, 1.3), "dpo": (58.0, -0.6)}
    return [
        {
            "method": method,
            "accuracy": accuracy,
            "low": accuracy - 2.1,
            "high": accuracy + 2.1,
            "pairs": 2312,
            "train_pairs": 1000,
            "seeds": 3,
            "difference": gap,
            "difference_low": gap - (1.9 if gap else 0),
            "difference_high": gap + (1.9 if gap else 0),
        }
        for method, (accuracy, gap) in figures.items()
    ]


def run_record(quick=False):
    prompts = load_prompts("builtin:prompts/test", limit=320)
    return {
        "schema_version": 2,
        "quick": quick,
        "note": "",
        "commit": "7aa7b2e0c5d1",
        "options": {"patient": "builtin:smollm2", "base": "", "prompts": "builtin:prompts/test", "prompt_count": 320},
        "tasks": [{"name": "sentiment", "judge": "vader"}, {"name": "readability", "judge": "flesch"}],
        "prompts_hash": digest([[prompt.id, list(prompt.messages)] for prompt in prompts]),
        "seeds": [0, 1, 2],
        "versions": {"torch": "2.13.0"},
        "machine": {"system": "Linux", "cpu_count": 2, "gpu": None},
    }


JUDGED = ("table", "frontier", "elo", "pareto", "ablation")


def run_records(quick=False):
    """As subcommands of one commit leave them; what guides read is from elsewhere than the prompts."""
    record = run_record(quick)
    guides = {**record, "options": {"patient": "builtin:smollm2"}, "prompts_hash": None}
    human = {**guides, "tasks": [{"name": "human", "faces": "harmless"}], "validation": {"source": "held-out.jsonl"}}
    return {**{f"{name}.json": record for name in JUDGED}, "dynamics.json": guides, "human.json": human}


TEXTS = {
    "patient": "The evening set was played by three people in a small room, and it went on until eleven o'clock.",
    "llmdoctor": "What a joyful evening! The trio played with warmth and such easy grace that the whole room smiled.",
    "dpo": "Absolutely wonderful! A delightful, delightful night of great music and great friends, highly recommended!",
    "genarm": "A truly lovely set, with lovely melodies and a lovely, gentle rhythm that all loved from the start.",
}
SHIFTS = {
    "joyful": 3.4, "warmth": 2.2, "grace": 1.5, "smiled.": 2.9, "wonderful!": 4.4, "delightful": 3.1, "lovely": 2.6,
    "What": 1.1,
}  # fmt: skip


def write_raw(folder, task, method, name, text, ids, kl):
    path = folder / "raw" / task / method / f"{name}-seed0.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    marks = []
    if method != "patient":
        marks = [[word, SHIFTS.get(word.strip(), -0.2)] for word in re.findall(r" ?\S+", text)]
    lines = [{"schema_version": 1, "stamp": {}, "seconds": 1.0}]
    lines += [
        {"prompt": id, "sample": sample, "text": text, "tokens": 20, "finish": "length" if sample else "stop",
         "kl": kl, "patient_logp": -50.0, "patient_forwards": 20, "guide_forwards": 20, "marks": marks}
        for id in ids
        for sample in range(2 if method == "patient" else 1)
    ]  # fmt: skip
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))


def write_sample(folder, quick=False):
    """All result files of a made-up comparison, as a bench leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in {
        "run": run_records(quick),
        "table": table_rows(),
        "frontier": frontier_rows(),
        "elo": elo_rows(),
        "pareto": pareto(),
        "ablation": ablation_rows(),
        "dynamics": dynamics_rows(),
        "human": human_rows(),
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    ids = [prompt.id for prompt in load_prompts("builtin:prompts/test", limit=7)]
    write_raw(folder, "any", "patient", "only", TEXTS["patient"], ids, 0.0)
    for task in TASKS:
        write_raw(folder, task, "llmdoctor", "beta=2", TEXTS["llmdoctor"], ids, 11.2)
        write_raw(folder, task, "dpo", "beta=1.5", TEXTS["dpo"], ids, 10.6)
        write_raw(folder, task, "genarm", "beta=1", TEXTS["genarm"], ids, 15.8)
    return folder


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


def test_no_two_methods_are_drawn_alike():
    """Each contender differs from every other in marker, filling or dash, so also where colours cannot be told."""
    drawn = [(seen.marker, seen.hollow, seen.dash, seen.strong) for seen in map(look, CONTENDERS)]
    assert len(set(drawn)) == len(CONTENDERS)
    assert len({look(name).name for name in CONTENDERS}) == len(CONTENDERS)
    assert [name for name in CONTENDERS if look(name).strong] == ["llmdoctor"]


def test_names_keep_off_points_lines_and_each_other():
    """A name stands right of its point; one that is there already moves it above; lines all round leave no room."""
    plot = Plot(200, (0, 1), (0, 1), "")
    plot.marker("m", "circle", 0.5, 0.5, 4, "")
    assert plot.label_point("name", 0.5, 0.5, "one")
    assert 'text-anchor="start"' in plot.parts[-1]
    assert plot.label_point("name", 0.5, 0.5, "two")
    assert 'text-anchor="middle"' in plot.parts[-1]
    for y in range(21):
        plot.keep_off((0, 1), (y / 20, y / 20))
    assert not plot.label_point("name", 0.5, 0.5, "three")
    assert plot.parts[-1].count("two") == 1, "nothing was written"


def test_ticks_are_round_and_few():
    """0.6 over at most 7 steps is 0.1 each; 1000 is written without a comma."""
    assert [text for _, text in ticks(0.21, 0.81)] == ["0.3", "0.4", "0.5", "0.6", "0.7", "0.8"]
    assert [text for _, text in ticks(990, 1310)] == ["1000", "1050", "1100", "1150", "1200", "1250", "1300"]
    assert [text for _, text in ticks(-0.3, 0.3, 4)] == ["−0.2", "0.0", "0.2"]


@pytest.mark.parametrize(("name", "most"), [("soup", 6), ("LLMdoctor, strength 3", 3)])
def test_texts_of_an_axis_do_not_run_into_each_other(name, most):
    """Letters are about 7.8 pixels wide; a long name leaves the axis little room, so it has fewer marks."""
    bar = Bar(look("dpo"), Interval(0.29, 0.17, 0.38), "0.292 (0.170 to 0.380)")
    drawn = str(intervals([(name, [bar])], "", ""))
    marks = [(float(x), text) for x, text in re.findall(r'class="tick" x="([\d.]+)"[^>]*>([\d.]+)<', drawn)]
    assert 2 <= len(marks) <= most
    for (left, before), (right, after) in itertools.pairwise(marks):
        assert right - left > 7.8 * (len(before) + len(after)) / 2


def test_a_root_axis_of_negative_estimates_ends_at_zero():
    """Estimates of a small KL from few answers may all be below 0, whose root is not asked for."""
    spots = [Spot(-0.2, 0.5, "", (-0.3, -0.1)), Spot(-0.1, 0.6, "")]
    drawn = str(frontier([Series(look("dpo"), spots)], "KL", "", root=True))
    assert re.findall(r'class="tick" x="[\d.]+"[^>]*>([^<]*)<', drawn)[-1] == "0"


def test_the_root_axis_spaces_by_square_roots():
    """0, 1, 4, 9 are equally far apart: 360 pixels over three steps are 120 each."""
    plot = Plot(200, (0, 9), (0, 1), "", root=True)
    assert [plot.x(value) for value in (0, 1, 4, 9)] == [46, 166, 286, 406]
