"""`llmdoctor generate`: guided decoding of one prompt, or of a file of prompts."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdoctor.cli.command import Run, command
from llmdoctor.cli.doctors import DoctorArgument, check_doctors, load_doctors, say_translations, say_unmapped
from llmdoctor.cli.options import (
    DEFAULT_PATIENT,
    SAMPLING,
    Alpha,
    Device,
    Dimensions,
    Doctors,
    Draft,
    Dtype,
    Form,
    Onset,
    Overwrite,
    Patient,
    Stop,
    System,
    TrustRemoteCode,
    check_drafter,
    load,
    load_drafter,
)
from llmdoctor.cli.results import ResultFile, check_target
from llmdoctor.decoding.request import Completion, Request, SamplingParams
from llmdoctor.errors import UserError
from llmdoctor.files import digest, sha256_file

if TYPE_CHECKING:
    from llmdoctor.data.prompts import Prompt
    from llmdoctor.decoding.engine import GuidedDecoder
    from llmdoctor.decoding.request import Decoder
    from llmdoctor.models.loading import LoadedModel
    from llmdoctor.rewards.readout import Readout

WHY_ERROR = "a model gave no distribution to draw from (not a number), or memory did not suffice for that prompt alone"
"""What an answer that ends with an error says of itself."""

_Prompt = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="One prompt, answered to the terminal as it comes.")
]
_Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="SOURCE",
        help="Many prompts instead: a .txt (one a line), .jsonl, .json or .parquet file, or builtin:prompts/test.",
    ),
]
_Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE.jsonl",
        help="Where the answers to --prompts go, a JSON object a line, in the order of the prompts.",
    ),
]
_BestOf = Annotated[
    int,
    typer.Option(
        "--best-of", metavar="N", help="Draw N answers to each prompt and keep the one that a read-out likes best."
    ),
]
_Readout = Annotated[
    Path | None,
    typer.Option(
        "--readout",
        metavar="FOLDER",
        help="The judge of --best-of, from `llmdoctor readout`; by default the one in the doctor's folder.",
    ),
]


@command
def generate(
    run: Run,
    *,
    prompt: _Prompt = None,
    prompts: _Prompts = None,
    output: _Output = None,
    overwrite: Overwrite = False,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first so many of --prompts.")] = None,
    patient: Patient = DEFAULT_PATIENT,
    system: System = None,
    doctor: Doctors = [],  # noqa: B006 typer copies it
    dimension: Dimensions = [],  # noqa: B006
    form: Form = "ratio",
    alpha: Alpha = 1.0,
    onset: Onset = 0,
    sampling: Annotated[dict[str, Any], SAMPLING],
    stop: Stop = [],  # noqa: B006
    best_of: _BestOf = 1,
    readout: _Readout = None,
    draft: Draft = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts decoded together.")] = 32,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Let a patient answer, guided by doctors (stage 3); without a doctor it answers alone.

    A file of prompts that was cut goes on where it stopped when the same command is given again.

    Example: llmdoctor generate "How was your day?" --doctor runs/doctor=1.5

    Example: llmdoctor generate --prompts my-prompts.txt -o answers.jsonl --doctor runs/doctor

    Example: llmdoctor generate "How was your day?" --doctor runs/doctor=0.5 --best-of 4
    """
    if (prompt is None) == (prompts is None):
        raise UserError("give either one PROMPT or --prompts FILE")
    if (prompts is None) != (output is None):
        raise UserError("--prompts and --output belong together")
    if prompts is not None and output is not None and Path(prompts).resolve() == output.resolve():
        raise UserError(f"{output} holds the prompts, and would be written over; give the answers a file of their own")
    if prompts is None and (overwrite or limit is not None):
        raise UserError("--limit and --overwrite are of --prompts FILE; leave them out with one PROMPT")
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty")
    params = SamplingParams(**sampling, stop=tuple(stop))
    # Refuses an α that is no number.
    Request((), alpha, onset=onset)
    if output is not None:
        check_target(output, overwrite)
    arguments = [DoctorArgument.parse(text) for text in doctor]
    questions = _questions(prompts, limit) if prompts else []
    betas = check_doctors(arguments, dimension, form)
    readout = _readout_of(best_of, readout, arguments, params)
    check_drafter(draft)
    mixture = {"alpha": alpha, "betas": betas, "form": form, "system": system, **({"onset": onset} if onset else {})}
    how = (questions, arguments, sampling | {"stop": stop})
    if output is not None and readout is None and not overwrite:
        # All but the patient is known before that one is loaded.
        ResultFile(output, _recipe(None, mixture, *how)).check()
    model = load(run, patient, dtype, device, trust_remote_code)
    guides, betas = load_doctors(
        run, arguments, model, form=form, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    from llmdoctor.decoding.engine import GuidedDecoder

    decoder = GuidedDecoder(model, guides, max_batch_size=batch_size, draft=load_drafter(run, draft, model))
    say_translations(run, decoder)
    judge = _judge(readout, model)
    if prompt is not None:
        asked = Request(_conversation(prompt, system), alpha, betas, params, onset=onset)
        _answer_one(run, decoder, asked, judge, best_of)
        say_unmapped(run, decoder.tally.unmapped_mass, decoder.tally.first_piece_share)
        return
    if judge is not None:
        mixture |= {"best_of": best_of, "readout": digest(judge.weights.tolist())}
    recipe = _recipe(model, mixture, *how)
    requests = [
        Request(_with_system(question, system), alpha, betas, _seeded(params, question.id), question.id, onset)
        for question in questions
    ]
    drawing = decoder if judge is None else _best_of(decoder, judge, best_of)
    _answer_all(run, drawing, requests, ResultFile(output or Path(), recipe, overwrite=overwrite))
    say_unmapped(run, decoder.tally.unmapped_mass, decoder.tally.first_piece_share)


def show_stream(pieces: Iterator[str]) -> Completion:
    """Print a stream of text as it comes; returns what the stream returns at its end.

    A line that has begun is ended however the stream is, so that what is said next stands on one of its own.
    """
    begun = False
    try:
        while True:
            piece = next(pieces)
            begun = True
            typer.echo(printable(piece), nl=False)
            sys.stdout.flush()
    except StopIteration as end:
        begun = True
        return end.value
    finally:
        if begun:
            typer.echo()


def printable(text: str) -> str:
    """Text without characters that a terminal would obey."""
    return "".join("\ufffd" if _commands(letter) else letter for letter in text)


def _commands(letter: str) -> bool:
    """Control characters, lone surrogates and direction overrides; spaces and joiners of any script are text."""
    return letter not in "\n\t" and (
        unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in "\u202a\u202b\u202d\u202e"
    )


def _readout_of(
    best_of: int, readout: Path | None, doctors: Sequence[DoctorArgument], sampling: SamplingParams
) -> Path | None:
    """The folder of the judge of `--best-of`: the one given, or the one that rounds left in a doctor's folder."""
    if best_of < 1:
        raise UserError(f"--best-of must be at least 1 answer, got {best_of}")
    if readout is not None and best_of == 1:
        raise UserError(f"--readout chooses among the answers of --best-of N with N above 1, got --best-of {best_of}")
    if best_of == 1:
        return None
    if sampling.temperature == 0:
        raise UserError(f"--best-of {best_of} draws samples, so the temperature must be above 0")
    from llmdoctor.models.doctor import READOUT_FOLDER, local_folder
    from llmdoctor.rewards.readout import CONFIG_NAME, read_record

    if readout is not None:
        read_record(readout)
        return readout
    folders = [local_folder(doctor.path) / READOUT_FOLDER for doctor in doctors]
    found = [folder for folder in folders if (folder / CONFIG_NAME).is_file()]
    if len(found) != 1:
        why = "several doctors have one each" if found else "no doctor given here has one in its folder"
        raise UserError(f"--best-of {best_of} needs one read-out that chooses, and {why}: give --readout FOLDER")
    return found[0]


def _judge(folder: Path | None, patient: LoadedModel) -> Readout | None:
    if folder is None:
        return None
    from llmdoctor.rewards.readout import Readout

    return Readout.from_pretrained(folder, patient)


def _best_of(decoder: Decoder, judge: Readout, count: int) -> Decoder:
    from llmdoctor.baselines.best_of_n import BestOfN

    return BestOfN(decoder, judge, count)


def _questions(source: str, limit: int | None) -> list[Prompt]:
    from llmdoctor.data.prompts import load_prompts

    return load_prompts(source, limit)


def _conversation(prompt: str, system: str | None) -> tuple[dict[str, str], ...]:
    user = {"role": "user", "content": prompt}
    return (user,) if system is None else ({"role": "system", "content": system}, user)


def _with_system(prompt: Prompt, system: str | None) -> tuple[Mapping[str, Any], ...]:
    if system is None:
        return prompt.messages
    own = prompt.messages[0]["role"] == "system"
    return ({"role": "system", "content": system}, *prompt.messages[own:])


def _seeded(params: SamplingParams, name: str) -> SamplingParams:
    """A prompt's own seed: not its neighbour's, and the same in a file of other prompts (53 bits: exact in JSON)."""
    return SamplingParams(**{**vars(params), "seed": int(digest([params.seed, name]), 16) >> 11})


def _recipe(
    patient: LoadedModel | None,
    mixture: dict[str, Any],
    prompts: Sequence[Prompt],
    doctors: Sequence[DoctorArgument],
    sampling: dict[str, Any],
) -> dict[str, Any]:
    """How answers are made; without a patient, all that is known before it is loaded."""
    recipe: dict[str, Any] = {
        "versions": {name: version(name) for name in ("llmdoctor", "torch", "transformers")},
        "settings": {
            "doctors": {"doctors": [argument.path for argument in doctors]},
            "mixture": mixture,
            "sampling": sampling,
        },
        "fingerprint": {
            "doctors": digest([_weights(argument) for argument in doctors]),
            "mixture": digest(mixture),
            "sampling": digest(sampling),
            "prompts": digest([[prompt.id, list(prompt.messages)] for prompt in prompts]),
        },
    }
    if patient is not None:
        recipe["settings"]["patient"] = {"patient": patient.spec, **patient.fingerprint}
        recipe["fingerprint"]["patient"] = digest(patient.fingerprint)
    return recipe


def _weights(argument: DoctorArgument) -> list[str]:
    from llmdoctor.models.doctor import local_folder

    files = sorted(local_folder(argument.path).glob("*/*.safetensors"))
    return [sha256_file(path) for path in files if path.parent.name in ("adapter", "model")]


def _answer_one(run: Run, decoder: GuidedDecoder, request: Request, judge: Readout | None, best_of: int) -> None:
    run.kept = "One answer is not kept anywhere."
    if judge is None:
        completion = show_stream(decoder.stream(request))
    else:
        completion = _best_of(decoder, judge, best_of).generate([request])[0]
        typer.echo(printable(completion.text))
    if completion.finish_reason == "error":
        raise UserError(f"{WHY_ERROR}; the answer ends there")
    passes = len(completion.token_ids) - completion.guesses_held
    guessed = f", {len(completion.token_ids) / passes:.2f} a pass" if completion.guessed else ""
    run.progress.say(f"{len(completion.token_ids)} tokens{guessed}, ended by {completion.finish_reason}")


def _answer_all(run: Run, decoder: Decoder, requests: Sequence[Request], results: ResultFile) -> None:
    if results.finished:
        run.say(f"{results.target} is finished already; --overwrite makes it anew")
        return
    with results:
        run.kept = f"Finished answers are kept in {results.partial}; the same command goes on from there."
        left = [number for number in range(len(requests)) if number not in results.rows]
        with run.progress.step("answering", len(requests), "prompts") as step:
            step.advance(len(requests) - len(left))

            broken: list[str] = []

            def keep(place: int, completion: Completion) -> None:
                number = left[place]
                if completion.finish_reason == "error":
                    broken.append(requests[number].id or str(number + 1))
                results.add(number, _row(requests[number], completion))
                step.advance()

            decoder.generate([requests[number] for number in left], on_done=keep)
        results.finish(len(requests))
    if broken:
        names = ", ".join(broken[:5]) + (", …" if len(broken) > 5 else "")
        run.say(f"{len(broken)} of them end with an error: {names} ({WHY_ERROR})")
    run.say(f"{len(requests)} answers are in {results.target}, how they were made in {results.recipe_path}")


def _row(request: Request, completion: Completion) -> dict[str, Any]:
    row = {
        "id": request.id,
        "prompt": list(request.messages),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.token_ids),
        "seed": request.sampling.seed,
        "alpha": request.alpha,
        "betas": dict(request.betas or {}),
        "onset": request.onset,
        # One sample of KL(what was drawn from ‖ patient) in nats: its mean over rows estimates the divergence of a
        # response, or bounds it where this is the best of several.
        "kl_estimate": completion.kl,
    }
    return row if completion.unmapped_mass is None else row | {"unmapped_mass": completion.unmapped_mass}
