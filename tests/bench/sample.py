"""Result files of a made-up comparison, as a bench leaves them."""

from __future__ import annotations

import gzip
import json
import re

from llmdoctor.data.prompts import load_prompts
from llmdoctor.files import digest

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
            "of": "" if variant == "whole" else "no_rounds" if variant.startswith("pairs_") else "no_pairs",
            **dict.fromkeys(("win_plus_half_tie", "ci_low", "ci_high"), None),
            **({} if variant == "whole" else {"win_plus_half_tie": 61.5, "ci_low": 58.1, "ci_high": 64.9}),
            "by_seed": [] if variant == "whole" else [60.0, 61.0, 63.5],
            "clamped": False,
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
                    "seeds": 3,
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
