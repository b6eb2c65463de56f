"""One doctor's training: in rounds, on the pairs, or on the pairs and then in rounds."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.data.collate import RewardCollator
from llmdoctor.errors import UserError
from llmdoctor.files import digest, fill_folder
from llmdoctor.models.context import context_of
from llmdoctor.models.doctor import ADAPTER_FOLDER, CONFIG_NAME, MODEL_FOLDER, READOUT_FOLDER, Doctor, DoctorConfig
from llmdoctor.models.loading import LoadedModel
from llmdoctor.rewards.readout import CONFIG_NAME as READOUT_CONFIG
from llmdoctor.rewards.readout import Readout, fit_readout_to_ids
from llmdoctor.rewards.store import SIDES, RewardStore
from llmdoctor.tfpo.checkpoints import claim_checkpoints, last_checkpoint
from llmdoctor.tfpo.config import TFPOConfig
from llmdoctor.tfpo.options import DoctorOptions, decisive, lora_arguments, training_record
from llmdoctor.tfpo.rounds import ReadoutJudge, RoundOptions, RoundsTrainer, answering
from llmdoctor.tfpo.trainer import TFPOTrainer

_log = logging.getLogger(__name__)

READOUT_PAIRS = 4096
"""A read-out for rounds is fitted to so many pairs at most, evenly spread over them: it has a weight a dimension of
some states to learn, and more pairs would take the patient's reading and memory for little."""

Told = Callable[[str, int], None]


@contextmanager
def first_process(config: TFPOConfig) -> Iterator[bool]:
    """One process goes first, in which this is true; the others of the training wait for it and follow."""
    with config.main_process_first(local=False):
        yield config.process_index == 0


@dataclass(frozen=True)
class Lesson:
    """What a doctor is trained from, the same for each of several.

    Attributes:
        base: its base model; adapters come off again at the end of a training.
        patient: judges, and perhaps gives, the answers of rounds; None where there are none.
        given: token rewards in the patient's tokens.
        rewards: the same in the base's.
        train_set, held_out: rows of `rewards`; no held-out ones is None.
        config: training arguments, but for the folder.
        options: what is trained.
        dimension: what it is for.
        callbacks: of each training.
        told: as `train_doctor`'s.
    """

    base: LoadedModel
    patient: LoadedModel | None
    given: RewardStore
    rewards: RewardStore
    train_set: Any
    held_out: Any | None
    config: TFPOConfig
    options: DoctorOptions
    dimension: str
    callbacks: tuple[TrainerCallback, ...]
    told: Told

    def teach(self, rounds: RoundOptions, output: Path, resume: bool = True) -> None:
        """Train one doctor and write it to `output`, its checkpoints below.

        Raises:
            As `train_doctor`.
        """
        checkpoints = output / "checkpoints"
        with self._of(self._untrained(rounds)) as doctor:
            with first_process(self.config) as first:
                checkpoint = claim_checkpoints(checkpoints, doctor.doctor_config, resume or not first)
            trainer: TFPOTrainer | None = None
            if not rounds.rounds or rounds.pairs_first:
                self.told("reading the pairs before training", len(self.train_set) + len(self.held_out or ()))
                trainer = self._trainer(doctor, checkpoints, self.train_set, self.callbacks)
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if rounds.rounds:
                trainer = self._rounds_trainer(doctor, rounds, checkpoints)
                checkpoint = last_checkpoint(Path(trainer.args.output_dir))
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            assert trainer is not None
            judge = checkpoints / READOUT_FOLDER if rounds.rounds else None
            self._write(doctor, output, _held_out_figures(trainer), judge)

    def taught(self, rounds: RoundOptions, output: Path) -> bool:
        """Whether `output` holds the doctor that `teach` would write there."""
        if not (output / CONFIG_NAME).is_file():
            return False
        found, record = DoctorConfig.load(output), training_record(self.config, self.options, rounds)
        return (
            found.dimension == self.dimension
            and found.is_on(self.base)
            and found.rewards_fingerprint == dict(self.rewards.fingerprint)
            # As JSON, which knows no tuples.
            and digest(decisive(found.training)) == digest(decisive(record))
        )

    def finish(self, doctor: Doctor, output: Path, readout: Path) -> None:
        """Measure a doctor that is there, its value head untrained, and write it, with its judge, to `output`."""
        figures: dict[str, float] = {}
        with self._of(doctor):
            if self.held_out is not None:
                self.told("reading the pairs held out", len(self.held_out))
                figures = _held_out_figures(self._trainer(doctor, output / "checkpoints", None, ()))
                # Its balance is that of an untrained value head, which says nothing.
                del figures["loss"]
            self._write(doctor, output, figures, readout)

    @contextmanager
    def _of(self, doctor: Doctor) -> Iterator[Doctor]:
        """What is done with a doctor; at the end the base is itself again where the doctor is an adapter on it."""
        model, lora = self.base.model, self.options.lora
        attention = model.config._attn_implementation
        if model.device.type == "cpu":
            # Fused attention has no fast bf16 backward on CPUs; at completion lengths the plain product is faster.
            model.set_attn_implementation("eager")
        try:
            yield doctor
        finally:
            if lora:
                doctor.lm.unload()
                if self.config.gradient_checkpointing:
                    model.gradient_checkpointing_disable()
                    model.disable_input_require_grads()
                model.set_attn_implementation(attention)

    def _write(self, doctor: Doctor, output: Path, figures: dict[str, float], readout: Path | None) -> None:
        """Put the finished doctor beside its checkpoints."""
        counts = {"train_pairs": float(len(self.train_set)), "held_out_pairs": float(len(self.held_out or ()))}
        doctor.doctor_config.metrics = {**figures, **counts}
        doctor.readout = readout
        with first_process(self.config) as first:
            if first:
                gone = (ADAPTER_FOLDER, MODEL_FOLDER, READOUT_FOLDER)
                fill_folder(output, doctor.save_pretrained, last=CONFIG_NAME, gone=gone)

    def _untrained(self, rounds: RoundOptions) -> Doctor:
        """The doctor before its first step, with what it will be trained by on its card."""
        base, options = self.base, self.options
        doctor = Doctor.from_base(
            base,
            lora=lora_arguments(base.model, options) if options.lora else None,
            value_hidden=options.value_hidden,
            dimension=self.dimension,
            seed=self.config.seed,
        )
        doctor.doctor_config.rewards_fingerprint = dict(self.rewards.fingerprint)
        doctor.doctor_config.training = training_record(self.config, options, rounds)
        return doctor

    def _arguments(self, folder: Path) -> TFPOConfig:
        config = copy.copy(self.config)
        config.output_dir = str(folder)
        return config

    def _trainer(
        self, doctor: Doctor, folder: Path, rows: Any | None, callbacks: Sequence[TrainerCallback]
    ) -> TFPOTrainer:
        return TFPOTrainer(
            doctor, self._arguments(folder), rows, self.held_out,
            progress=lambda units: self.told("", units), callbacks=list(callbacks),
        )  # fmt: skip

    def _rounds_trainer(self, doctor: Doctor, rounds: RoundOptions, checkpoints: Path) -> RoundsTrainer:
        assert self.patient is not None
        answerer = None if doctor.doctor_config.is_on(self.patient) else self.patient
        if answerer is not None:
            # What cannot answer is told now, not after the pairs were read.
            answering(doctor, answerer, 1)
        count = len(self.train_set)
        with first_process(self.config):
            readout = _readout(checkpoints, self.given, count, self.patient, self.told)
        length = rounds.round_max_new_tokens or max(
            len(ids)
            for row in (self.train_set if answerer is None else self.given.rows(count))
            for ids in (row[f"{side}_ids"] for side in SIDES)
        )
        most = self.config.max_prompt_length
        prompts = [
            prompt
            for prompt in dict.fromkeys(self.train_set["prompt"])
            if most is None or len(doctor.encoder.prompt_ids(json.loads(prompt))) <= most
        ]
        if self.held_out is not None:
            self.told("reading the pairs held out", len(self.held_out))
        return RoundsTrainer(
            doctor, self._arguments(checkpoints / "rounds"), rounds, prompts, ReadoutJudge(readout, self.base), length,
            patient=answerer, eval_dataset=self.held_out, told=self.told, callbacks=list(self.callbacks),
            progress=lambda units: self.told("", units),
        )  # fmt: skip


def need_pairs_for_rounds(count: int) -> None:
    """UserError where so many pairs to train on are too few for rounds."""
    if count < 4:
        raise UserError(f"rounds need at least 4 pairs to fit a judge to, got {count}; with rounds 0 the pairs suffice")


def _readout(checkpoints: Path, rewards: RewardStore, count: int, patient: LoadedModel, told: Told) -> Readout:
    """The patient's read-out of the first `count` pairs, `READOUT_PAIRS` of them.

    It is kept among the checkpoints, which belong to these rewards.
    """
    need_pairs_for_rounds(count)
    folder = checkpoints / READOUT_FOLDER
    if (folder / READOUT_CONFIG).is_file():
        return Readout.from_pretrained(folder, patient)
    encoder = ChatEncoder.for_model(patient.model, patient.tokenizer)
    every = -(-count // READOUT_PAIRS)
    pairs = [
        (encoder.prompt_ids(json.loads(row["prompt"])), row["chosen_ids"], row["rejected_ids"])
        for row in itertools.islice(rewards.rows(count), 0, None, every)
    ]
    told("reading the pairs for the read-out", len(pairs))
    readout = fit_readout_to_ids(
        patient,
        pairs,
        # Few pairs are left out in fewer parts.
        folds=min(5, count // 2),
        progress=lambda units: told("", units),
    )
    readout.save_pretrained(folder)
    if readout.fit.accuracy < 0.55:
        _log.warning(
            "On pairs left out the read-out prefers the right answer in %.0f %% of the cases only: the doctor learns "
            "little from it. More pairs may help, or rounds 0.",
            100 * readout.fit.accuracy,
        )
    return readout


def split_rows(rewards: RewardStore, eval_fraction: float) -> tuple[Any, Any | None]:
    """Rows to train on and rows held out, the last `eval_fraction` of the store; None where there are none.

    Raises:
        UserError: none are left to train on.
    """
    dataset = rewards.dataset()
    held_out = held_out_pairs(len(dataset), eval_fraction)
    cut = len(dataset) - held_out
    return dataset.select(range(cut)), dataset.select(range(cut, len(dataset))) if held_out else None


def held_out_pairs(pairs: int, eval_fraction: float) -> int:
    """How many of the pairs are held out; UserError where none are left to train on."""
    held_out = round(pairs * eval_fraction)
    if held_out >= pairs:
        raise UserError(f"{pairs} pairs leave none to train on with eval_fraction {eval_fraction}")
    return held_out


def need_room(base: LoadedModel, rewards: RewardStore, max_prompt_length: int | None = None) -> None:
    """UserError for a pair that the base cannot read as a whole, its prompt as it stands.

    The patient, too, has read it under faces, which replace a system prompt that may be longer.
    """
    collator = RewardCollator(ChatEncoder.for_model(base.model, base.tokenizer), max_prompt_length)
    context = context_of(base.model)
    for row in rewards.rows():
        prompt, response = len(collator.prompt_ids(row)), max(len(row[f"{side}_ids"]) for side in SIDES)
        if prompt + response > context:
            raise UserError(
                f"pair {row['index'] + 1} has a prompt of {prompt} and a response of {response} tokens, more than "
                f"{base.spec}'s context of {context}: give max_prompt_length (the last so many tokens of a prompt are "
                "kept), or score the pairs again with a smaller max_completion_length"
            )


def _held_out_figures(trainer: TFPOTrainer) -> dict[str, float]:
    """The metrics of the final weights; evaluated here unless the last evaluation was of them."""
    if trainer.eval_dataset is None:
        return {}
    done = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    figures = done[-1] if done and done[-1]["step"] == trainer.state.global_step else trainer.evaluate()
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in figures.items()
        if name.startswith("eval_") and not name.endswith(("_time", "runtime", "per_second"))
    }
