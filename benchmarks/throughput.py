"""How do tokens a second, and what guessing ahead brings, depend on the batch's size and the answers' length?

    python -m benchmarks.throughput [--quick] [--patient builtin:smollm2] [--doctor FOLDER] [--draft FOLDER]
                                    [--output benchmarks/results/throughput.json] [--plot throughput.svg]
    python -m benchmarks.throughput --redraw benchmarks/results/throughput.json --plot throughput.svg

Three ways to decode the same prompts with the same sampling (temperature 1, no answer ends early), in one process:

- patient: our engine, the patient alone;
- guided: with a LoRA doctor on the patient's base, in the patient's own pass (ratio form);
- speculative: as guided, with a draft model that guesses ahead; left out where there is none.

Over batches of 1 to 64 rows of 128 new tokens each, medians of interleaved rounds, the prompts' passes included; and
over answers of 128 to 4,096 tokens, for 1 row and for 4: there each way writes one long answer a row, the ways taking
turns, and the rate at a length is that of the last 128 tokens a row before it, once, the prompts' passes not included.
Acceptance is how often the first candidate held, where it was looked at; guesses and tokens are those of one row in one
pass of the patient. The engine chooses how many to guess by what guesses have brought and cost so far.

A run that is cut goes on, with the same --output, after the last number of rows that it had finished (--output's name
with .part keeps them until then), unless the commit, the machine or what was asked for is another.

Without --doctor it has the shape that `llmdoctor train` gives it and random numbers for weights: then these are
timings, not quality, and guesses hold as often as they do for such a doctor.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from benchmarks.decoding import DRAFT, asked, conversations, make_doctor
from benchmarks.record import circumstances, record
from llmdoctor.bench.report.charts import WIDTH, Series, Spot, sheet
from llmdoctor.bench.report.looks import Look, look
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import Guide, load_guide
from llmdoctor.decoding.request import Request
from llmdoctor.decoding.row import Row
from llmdoctor.evaluation.plot import Plot, ticks
from llmdoctor.files import write_text
from llmdoctor.models.doctor import DoctorConfig
from llmdoctor.models.draft import DraftModel, load_draft
from llmdoctor.models.loading import LoadedModel, load_model

_SLACK = 1.25
"""Rows whose guesses hold more often run ahead of the others; so much longer an answer may grow than its length, so
that none has ended when all together have the tokens that are timed."""

LOOKS = {
    "patient": look("patient"),
    "guided": replace(look("llmdoctor"), name="guided"),
    "speculative": Look("guided, guessing ahead", "", "", "vermillion", "up"),
}
_GUESSING = {
    "tokens_per_pass": Look("tokens a pass", "", "", "blue", "circle"),
    "guesses_per_pass": Look("guesses a pass", "", "", "gold", "square"),
    "acceptance": Look("acceptance", "", "", "purple", "diamond"),
}
_DASHES = ("", "dashed", "dotted")


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        batches: rows decoded together, of `tokens` new tokens each.
        tokens: new tokens a row.
        rounds: times that each is timed.
        lengths: new tokens a row at which the last `stretch` of them are timed.
        stretch: tokens a row.
        long_batches: rows of the long answers.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    tokens: int = 128
    rounds: int = 2
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    stretch: int = 128
    long_batches: tuple[int, ...] = (1, 4)


QUICK = Sizes((1, 4), 16, 1, (32, 64), 16, (1,))


@dataclass(frozen=True)
class Counts:
    """What some rows have done: tokens drawn, guesses made and held, first candidates looked at and held."""

    tokens: int = 0
    guessed: int = 0
    held: int = 0
    looked_at: float = 0.0
    first_held: float = 0.0

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Counts:
        done = [row.completion for row in rows]
        return cls(
            sum(len(made.token_ids) for made in done),
            sum(made.guessed for made in done),
            sum(made.guesses_held for made in done),
            sum(float(row.guesses_tried[0]) for row in rows),
            sum(float(row.guesses_held[0]) for row in rows),
        )

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))

    def figures(self) -> dict[str, float | None]:
        passes = self.tokens - self.held
        return {
            "acceptance": self.first_held / self.looked_at if self.looked_at else None,
            "guesses_per_pass": self.guessed / passes,
            "tokens_per_pass": self.tokens / passes,
        }


class WatchedDecoder(GuidedDecoder):
    """A decoder whose rows can be looked at between its passes; no answer ends before its length."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoder.stop_ids = frozenset()

    def passes(self, requests: Sequence[Request]) -> Iterator[list[Row]]:
        """Complete the requests; yields all rows after every pass."""
        rows = [self._open(index, request) for index, request in enumerate(requests)]
        for _ in self._decode(rows):
            yield rows


def decoders(
    patient: LoadedModel, guide: Guide, draft: DraftModel | None, rows: int
) -> dict[str, tuple[WatchedDecoder, list[Guide]]]:
    """Of each way a decoder of its own, so that each learns for itself how much to guess, and who is heard."""
    found = {
        "patient": (WatchedDecoder(patient, [], max_batch_size=rows), list[Guide]()),
        "guided": (WatchedDecoder(patient, [guide], max_batch_size=rows), [guide]),
    }
    if draft is not None:
        found["speculative"] = WatchedDecoder(patient, [guide], max_batch_size=rows, draft=draft), [guide]
    return found


def by_batch(
    patient: LoadedModel, guide: Guide, draft: DraftModel | None, sizes: Sizes, batch: int
) -> Iterator[dict[str, Any]]:
    """Every way over a batch of this size."""
    ways = decoders(patient, guide, draft, batch)

    def work(way: str, tokens: int) -> tuple[float, Counts]:
        decoder, guides = ways[way]
        requests = asked(guides, batch, tokens)
        rows: list[Row] = []
        start = time.perf_counter()
        for rows in decoder.passes(requests):  # noqa: B007
            pass
        return time.perf_counter() - start, Counts.of(rows)

    for way in ways:
        # What is guessed follows what guesses have cost, which takes some rounds to be known.
        work(way, sizes.tokens if way == "speculative" else min(sizes.tokens, 16))
    gc.collect()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    counts = {}
    for _ in range(sizes.rounds):
        for way in ways:
            # The same tokens every time: counts differ between rounds by what the engine chooses to guess.
            took, counts[way] = work(way, sizes.tokens)
            seconds[way].append(took)
    for way, times in seconds.items():
        yield {
            "over": "batch", "batch": batch, "length": sizes.tokens, "way": way,
            "tokens_per_second": counts[way].tokens / statistics.median(times), "seconds": times,
            **(counts[way].figures() if way == "speculative" else {}),
        }  # fmt: skip


class Answer:
    """Long answers of one way, written as far as asked for."""

    def __init__(self, passes: Iterator[list[Row]]) -> None:
        self._passes = passes
        self.rows: list[Row] = []
        self.counts = Counts()

    def write(self, tokens: int) -> tuple[float, Counts]:
        """Go on until the rows have so many tokens together; returns the time it took and what was done in it."""
        before = self.counts
        start = time.perf_counter()
        while not self.rows or sum(len(row.completion.token_ids) for row in self.rows) < tokens:
            self.rows = next(self._passes)
        seconds = time.perf_counter() - start
        self.counts = Counts.of(self.rows)
        return seconds, self.counts - before


def fitting(patient: LoadedModel, batch: int, sizes: Sizes) -> list[int]:
    """The lengths that the patient's context has room for."""
    decoder = WatchedDecoder(patient, [])
    longest = max(len(decoder.encoder.prompt_ids(messages)) for messages in conversations(batch))
    return [length for length in sizes.lengths if longest + _SLACK * length < decoder.context]


def by_length(
    patient: LoadedModel, guide: Guide, draft: DraftModel | None, sizes: Sizes, batch: int
) -> Iterator[dict[str, Any]]:
    """Every way along answers of the greatest length."""
    lengths = fitting(patient, batch, sizes)
    if len(lengths) < len(sizes.lengths):
        lost = [length for length in sizes.lengths if length not in lengths]
        print(f"left out, because the patient's context is too short: {', '.join(map(str, lost))} tokens")
    if not lengths:
        return
    answers = {}
    for way, (decoder, guides) in decoders(patient, guide, draft, batch).items():
        for _ in decoder.passes(asked(guides, batch, min(lengths[0], 32))):
            pass
        answers[way] = Answer(decoder.passes(asked(guides, batch, math.ceil(_SLACK * lengths[-1]))))
    for length in lengths:
        for way, answer in answers.items():
            # The first token comes with the prompt's pass.
            answer.write(batch * max(1, length - sizes.stretch))
            seconds, counts = answer.write(batch * length)
            yield {
                "over": "length", "batch": batch, "length": length, "way": way,
                "tokens_per_second": counts.tokens / seconds, "seconds": [seconds],
                **(counts.figures() if way == "speculative" else {}),
            }  # fmt: skip


class Kept:
    """Rows of a run that may have been cut, in a file of their own.

    Args:
        path: where; None keeps nothing.
        recipe: what they depend on; rows of another one are measured anew.
    """

    def __init__(self, path: Path | None, recipe: dict[str, Any]) -> None:
        self.path = path
        self.recipe = recipe
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["recipe"] == recipe:
                self.rows = found["rows"]
                print(f"going on after the {len(self.rows)} figures in {path}")

    def has(self, over: str, batch: int) -> bool:
        """Whether these are there already."""
        return any((row["over"], row["batch"]) == (over, batch) for row in self.rows)

    def save(self) -> None:
        """Write them down."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps({"recipe": self.recipe, "rows": self.rows}))


def measure(arguments: argparse.Namespace, doctor: Path, draft: Path | None, kept: Kept) -> dict[str, Any]:
    sizes = QUICK if arguments.quick else Sizes()
    patient = load_model(arguments.patient)
    guide = load_guide(doctor, patient, name="it")
    if guide.adapter is None or guide.model is not patient:
        raise SystemExit(f"{arguments.patient} cannot be run with {arguments.doctor or 'a LoRA doctor'} in one pass")
    model = None if draft is None else load_draft(draft, patient)
    rows = kept.rows
    print(f"{'rows':>5} {'length':>7} {'way':>12} {'tokens/s':>9} {'÷ patient':>10} {'accepted':>9} {'guesses':>8}"
          f" {'tokens':>7}")  # fmt: skip

    def take(found: Iterator[dict[str, Any]]) -> None:
        alone = math.nan
        for row in found:
            # The patient comes first at every size and length.
            alone = row["tokens_per_second"] if row["way"] == "patient" else alone
            row["to_patient"] = row["tokens_per_second"] / alone
            rows.append(row)
            text = f"{row['batch']:>5} {row['length']:>7,} {row['way']:>12} {row['tokens_per_second']:>9,.1f}"
            text += f" {row['to_patient']:>10.2f}"
            if row["way"] == "speculative":
                accepted = "–" if row["acceptance"] is None else f"{row['acceptance']:.2f}"
                text += f" {accepted:>9} {row['guesses_per_pass']:>8.2f} {row['tokens_per_pass']:>7.2f}"
            print(text, flush=True)

    for over, one, batches in (("batch", by_batch, sizes.batches), ("length", by_length, sizes.long_batches)):
        for batch in batches:
            if not kept.has(over, batch):
                take(one(patient, guide, model, sizes, batch))
                kept.save()

    def table(key: str, over: str) -> dict[str, Any]:
        """way -> its figures over batch sizes, or over batch size and length."""
        found: dict[str, Any] = {}
        for row in rows:
            if row["over"] == over and key in row:
                place = found.setdefault(row["way"], {})
                if over == "length":
                    place = place.setdefault(str(row["batch"]), {})
                place[str(row["batch" if over == "batch" else "length"])] = row[key]
        return found

    keys = ("tokens_per_second", "acceptance", "guesses_per_pass", "tokens_per_pass")
    return {
        "new_tokens": sizes.tokens,
        "stretch": sizes.stretch,
        "rounds": sizes.rounds,
        "dtype": str(patient.model.dtype),
        **{f"{key}_by_{over}": table(key, over) for over in ("batch", "length") for key in keys},
        "rows": rows,
    }


def draw(result: dict[str, Any]) -> str:
    """The result as an SVG file: rates, and what guessing brought, over batch size and over length."""
    rows = result["rows"]
    panels, used, sizes = [], list[str](), list[Look]()
    for over, x_title in (("batch", "rows decoded together"), ("length", "new tokens a row")):
        own = [row for row in rows if row["over"] == over]
        rates, guesses = list[Series](), list[Series]()
        several = sorted({row["batch"] for row in own}) if over == "length" else [None]
        for batch, dash in zip(several, _DASHES, strict=False):
            here = [row for row in own if batch in (None, row["batch"])]
            if len(several) > 1:
                sizes.append(Look(f"{batch} row{'s' * (batch > 1)}, by length", "", "", "grey", "circle", dash=dash))
            for name, look_of, into in (*((way, LOOKS[way], rates) for way in LOOKS),
                                        *((key, _GUESSING[key], guesses) for key in _GUESSING)):  # fmt: skip
                if into is rates:
                    spots = [_spot(row, over, "tokens_per_second") for row in here if row["way"] == name]
                else:
                    spots = [_spot(row, over, name) for row in here if row.get(name) is not None]
                if spots:
                    into.append(Series(replace(look_of, dash=dash), spots))
                    used.append(name)
        if rates:
            panels.append(panel(rates, x_title, "tokens a second, all rows together"))
        if guesses:
            panels.append(panel(guesses, x_title, "guessing ahead, a row", height=220))
    looks = [kind for name, kind in (LOOKS | _GUESSING).items() if name in used] + sizes
    about = "a doctor of random weights" if result["doctor"] == "random LoRA" else f"a doctor for {result['doctor']}"
    note = (
        f"{result['patient']} with {about}, {result['machine']['gpu'] or 'on a CPU'}. By rows: {result['new_tokens']} "
        f"new tokens each, prompts included. By length: the last {result['stretch']} tokens before it."
    )
    if result["draft"] is None:
        note += " No draft model was there to guess ahead."
    return sheet("Throughput of guided decoding", note, stacked(panels), looks)


def _spot(row: dict[str, Any], over: str, key: str) -> Spot:
    name = f"{row['way']}, {row['batch']} × {row['length']:,} tokens"
    return Spot(row[over], row[key], f"{name}\n{key.replace('_', ' ')} {row[key]:,.2f}")


def panel(series: Sequence[Series], x_title: str, y_title: str, height: int = 280) -> Markup:
    """Curves from zero up over an axis on which every doubling is as wide."""
    xs = sorted({spot.x for entry in series for spot in entry.spots})
    ys = [spot.y for entry in series for spot in entry.spots]
    plot = Plot(
        height, (math.log2(xs[0]) - 0.15, math.log2(xs[-1]) + 0.25), (0.0, 1.06 * max(ys)), f"{y_title}, by {x_title}",
        width=WIDTH,
    )  # fmt: skip
    plot.y_axis(ticks(*plot.y_range))
    plot.x_axis([(math.log2(x), f"{x:,}") for x in xs], x_title)
    plot.text(plot.left, 9, y_title, "start", "axis")
    for entry in series:
        at, values = [math.log2(spot.x) for spot in entry.spots], [spot.y for spot in entry.spots]
        if len(at) > 1:
            plot.curve(entry.look.classes("line"), at, values)
        for x, y, spot in zip(at, values, entry.spots, strict=True):
            plot.marker(entry.look.classes("point"), entry.look.marker, x, y, 4.2, spot.title)
    return plot.svg()


def stacked(panels: Sequence[Markup]) -> Markup:
    """Pictures one below the other as one."""
    top, parts = 0, []
    for one in panels:
        height = int(str(one).split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()[1])
        parts.append(str(one).replace("<svg ", f'<svg y="{top}" width="{WIDTH}" height="{height}" ', 1))
        top += height + 16
    return Markup(f'<svg viewBox="0 0 {WIDTH} {top}">{"".join(parts)}</svg>')


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few sizes, 64 tokens at most; a minute on two cores")
    parser.add_argument("--patient", default="builtin:smollm2")
    parser.add_argument("--doctor", type=Path, help="a trained LoRA doctor on the patient; a random one if left out")
    parser.add_argument("--draft", type=Path, help=f"from `llmdoctor draft`; {DRAFT} if it is there")
    parser.add_argument("--output", type=Path, help="a JSON file with all rows")
    parser.add_argument("--plot", type=Path, help="an SVG file")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="measure nothing; draw what --output wrote")
    arguments = parser.parse_args(argv)
    if arguments.redraw:
        if not arguments.plot:
            parser.error("--redraw needs --plot FILE.svg")
        arguments.plot.write_text(draw(json.loads(arguments.redraw.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    draft = arguments.draft or (DRAFT if DRAFT.is_dir() else None)
    if draft is None:
        print("no draft model: nothing is measured with one (make it with `llmdoctor draft -o runs/draft`)")
    with tempfile.TemporaryDirectory() as folder:
        doctor = arguments.doctor
        if doctor is None:
            doctor = Path(folder) / "doctor"
            make_doctor(arguments.patient, doctor)
        head = {
            "benchmark": "throughput",
            "quick": arguments.quick,
            "patient": arguments.patient,
            "doctor": "random LoRA" if arguments.doctor is None else DoctorConfig.load(doctor).dimension,
            "draft": None if draft is None else "trained",
        }
        part = arguments.output and arguments.output.with_name(arguments.output.name + ".part")
        result = measure(arguments, doctor, draft, Kept(part, {**head, **circumstances()}))
        # The picture is drawn from the very file that is kept.
        file = arguments.output or Path(folder) / "throughput.json"
        record({**head, **result}, file)
        if part:
            part.unlink(missing_ok=True)
        if arguments.plot:
            arguments.plot.parent.mkdir(parents=True, exist_ok=True)
            arguments.plot.write_text(draw(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
