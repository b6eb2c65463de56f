"""Stage 2 as one call: a base model and token rewards to a doctor's folder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from transformers import SchedulerType, TrainerCallback

from llmdoctor.errors import UserError
from llmdoctor.models.doctor import READOUT_FOLDER, Doctor, DoctorConfig
from llmdoctor.models.loading import LoadedModel, load_model, need_one_gpu, placement_of
from llmdoctor.models.merging import merge_doctors
from llmdoctor.rewards.store import RewardStore
from llmdoctor.rewards.transfer import rewards_for
from llmdoctor.tfpo.checkpoints import claim_checkpoints
from llmdoctor.tfpo.config import TFPOConfig
from llmdoctor.tfpo.lesson import (
    Lesson,
    Told,
    first_process,
    held_out_pairs,
    need_pairs_for_rounds,
    need_room,
    split_rows,
)
from llmdoctor.tfpo.options import DoctorOptions, training_record
from llmdoctor.tfpo.rounds import RoundOptions

_OF_PAIRS = {"eta": "round_eta", "branch_coef": "round_branch_coef", "leaf_coef": "round_leaf_coef",
             "leaf_beta": "a round_leaf_coef with it", "value_coef": "", "value_margin": ""}  # fmt: skip
"""Settings of `TFPOConfig` that rounds do not go by, and what they go by instead."""

_BY_HELD_OUT_LOSS = ("reduce_lr_on_plateau", "greedy")


def train_doctor(
    base: LoadedModel,
    rewards: RewardStore,
    config: TFPOConfig,
    *,
    options: DoctorOptions | None = None,
    rounds: RoundOptions | None = None,
    patient: LoadedModel | None = None,
    dimension: str = "",
    resume: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    told: Told | None = None,
) -> Path:
    """Train a doctor on `base` and write it to `config.output_dir`.

    By default two are trained, one in rounds on its own answers and one on the pairs' labels, and it is their mean
    (`RoundOptions.pairs_weight`); each stands whole in `output_dir/checkpoints/parts`.

    Checkpoints go to `output_dir/checkpoints`; a run that was cut goes on from the last whole one and ends with the
    same weights as an uninterrupted one.

    Args:
        base: the doctor's base model. With LoRA it is itself again afterwards; else all its weights are trained.
        rewards: from stage 1; where only labels are learned from pairs, no faces need have read them. Where the base
            has another tokenizer than the patient that gave them, they are carried over to its tokens
            (`rewards.transfer`).
        config: training arguments; `output_dir` is the doctor's folder.
        options: what is trained; defaults if None.
        rounds: how the rounds go; defaults if None. Without rounds it learns from the pairs and their token rewards.
        patient: the model that gave the rewards, which in rounds judges answers and, where it is not the doctor's base,
            gives them; loaded beside the base, as the rewards' manifest names it, if None. Never `base` itself, which
            training changes.
        dimension: name of what the doctor is for; the faces' name if empty.
        resume: go on from a checkpoint if there is one; False starts anew.
        callbacks: more `TrainerCallback`s, for the progress of each training.
        told: called with what has just begun and the number of its units (pairs read, answers drawn), then with "" and
            the number of those just finished.

    Returns:
        The doctor's folder.

    Raises:
        UserError: a base that is the patient itself, rewards in the doctor's own folder or of another tokenizer whose
            tokens are no bytes, too few pairs, one that does not fit into the base's context, or a setting of `config`
            or `rounds` that nothing in this training goes by.
        FingerprintMismatch: the checkpoints there belong to other settings or rewards.
        TrainingDiverged: see `TFPOTrainer`.
    """
    options, rounds = options or DoctorOptions(), rounds or RoundOptions()
    need_one_gpu(base.model)
    check_training(rewards, config, options, rounds)
    if patient is not None and patient.model is base.model:
        raise UserError(
            "base and patient are one and the same model, and training changes the base: load it a second time, as "
            f"load_model({base.spec!r})"
        )
    output = Path(config.output_dir)
    carried = rewards_for(base, rewards)
    need_room(base, carried, config.max_prompt_length)
    train_set, held_out = split_rows(carried, options.eval_fraction)
    config = copy.copy(config)
    if held_out is None:
        config.eval_strategy = "no"
    lesson = Lesson(
        base, _patient_of(rewards, patient, base) if rounds.rounds else None, rewards, carried, train_set, held_out,
        config, options, dimension or rewards.dimension, tuple(callbacks), told or _silent,
    )  # fmt: skip
    if rounds.merges:
        _teach_both(lesson, rounds, output, resume)
    else:
        lesson.teach(rounds, output, resume)
    return output


def check_training(rewards: RewardStore, config: TFPOConfig, options: DoctorOptions, rounds: RoundOptions) -> None:
    """What `train_doctor` can refuse without a model, with its errors: told before one is loaded."""
    if Path(config.output_dir).resolve() == rewards.folder.resolve():
        raise UserError(f"{config.output_dir} holds the token rewards; give the doctor a folder of its own")
    check_settings(config, options, rounds, token_rewards=rewards.has_token_rewards, pairs=len(rewards))


def check_settings(
    config: TFPOConfig, options: DoctorOptions, rounds: RoundOptions, *, token_rewards: bool, pairs: int | None
) -> None:
    """Of `check_training` what can be told before the pairs are tokens.

    `token_rewards` says whether they will have any, `pairs` how many there are, None where nobody knows yet.
    """
    _check_heard(config, rounds)
    if rounds.rounds and not options.lora:
        raise UserError(
            "rounds need a LoRA doctor: a fully trained one keeps no reference to tilt from; with rounds 0 all weights "
            "are trained on the pairs"
        )
    if not token_rewards and (learner := learner_of_token_rewards(config, rounds)):
        raise UserError(
            f"no faces read the pairs, so they have no token rewards, of which {learner} learns: make them with faces "
            "(--faces NAME, or in Python the faces of acquire_rewards), or learn the labels alone, as rounds do by "
            "default"
        )
    held_out = None
    if pairs is not None:
        held_out = held_out_pairs(pairs, options.eval_fraction)
        if rounds.rounds:
            need_pairs_for_rounds(pairs - held_out)
    schedule = SchedulerType(config.lr_scheduler_type).value
    if schedule in _BY_HELD_OUT_LOSS and (rounds.rounds or held_out == 0):
        why = "rounds do not look at them while they train" if rounds.rounds else "there are none"
        raise UserError(
            f"lr_scheduler_type {schedule} goes by the loss on held-out pairs, and {why}: choose another, such as "
            f"cosine, or give {'rounds 0' if rounds.rounds else 'more pairs or a larger eval_fraction'}"
        )


def learner_of_token_rewards(config: TFPOConfig, rounds: RoundOptions) -> str:
    """The setting by which something is learned of the pairs' token rewards; "" where nothing is."""
    if rounds.rounds and not (rounds.merges or rounds.pairs_first):
        return ""
    of_second = rounds.rounds and not rounds.pairs_first
    objective = rounds.pairs_objective if of_second else config.objective
    if objective != "none":
        return f"{'pairs_objective' if of_second else 'objective'} {objective}"
    return f"branch_coef {config.branch_coef:g}" if config.branch_coef else ""


def _teach_both(lesson: Lesson, rounds: RoundOptions, output: Path, resume: bool) -> None:
    """A doctor in rounds and one on the pairs, the same as by themselves, and both as one."""
    checkpoints = output / "checkpoints"
    whole = DoctorConfig(
        lesson.base.spec, dict(lesson.base.fingerprint), rewards_fingerprint=dict(lesson.rewards.fingerprint),
        training=training_record(lesson.config, lesson.options, rounds),
    )  # fmt: skip
    with first_process(lesson.config) as first:
        claim_checkpoints(checkpoints, whole, resume or not first)
    of_pairs = copy.copy(lesson.config)
    of_pairs.objective = rounds.pairs_objective
    # The rounds first: what they need and lack is told before anything was trained.
    folders = [checkpoints / "parts" / name for name in ("rounds", "pairs")]
    parts = (lesson, replace(rounds, pairs_weight=0.0)), (replace(lesson, config=of_pairs), replace(rounds, rounds=0))
    for folder, (its_lesson, its_rounds) in zip(folders, parts, strict=True):
        if not its_lesson.taught(its_rounds, folder):
            its_lesson.teach(its_rounds, folder)
    merged = checkpoints / "parts" / "merged"
    with first_process(lesson.config) as first:
        if first:
            merge_doctors(folders, (1 - rounds.pairs_weight, rounds.pairs_weight), merged, dimension=lesson.dimension)
    lesson.finish(Doctor.from_pretrained(merged, base=lesson.base), output, folders[0] / READOUT_FOLDER)


def _check_heard(config: TFPOConfig, rounds: RoundOptions) -> None:
    """UserError for a setting that was changed and that nothing in this training would go by."""
    usual = RoundOptions()
    if not rounds.rounds:
        # How many answers are drawn together is never asked for what it decides.
        deaf = {field.name for field in fields(RoundOptions)} - {"rounds", "pairs_weight", "round_batch_size"}
        for name in sorted(deaf):
            if getattr(rounds, name) != getattr(usual, name):
                raise UserError(
                    f"{name} {getattr(rounds, name)} is a setting of the training in rounds, and rounds is 0: leave it "
                    "out, or give rounds"
                )
        return
    if rounds.pairs_first:
        if rounds.pairs_objective != usual.pairs_objective or rounds.pairs_weight not in (0, usual.pairs_weight):
            raise UserError(
                "pairs_weight and pairs_objective are of a second doctor, and with pairs_first there is but one: leave "
                "them out"
            )
        return
    defaults = {field.name: field.default for field in fields(TFPOConfig)}
    if rounds.merges:
        if rounds.pairs_objective == "none" and not config.branch_coef:
            if config.leaf_coef == config.value_coef == 0:
                raise UserError(
                    "pairs_objective 'none' with value_coef, leaf_coef and branch_coef 0 leaves the second doctor "
                    "nothing to learn: give pairs_weight 0, or pairs_objective 'subtb'"
                )
            if config.eta != defaults["eta"]:
                raise UserError(
                    f"eta {config.eta} is a setting of the balance on pairs, of which the second doctor learns the "
                    "labels alone: give round_eta, pairs_objective subtb, or rounds 0"
                )
        return
    for name, instead in _OF_PAIRS.items():
        if getattr(config, name) == defaults[name] or (name == "leaf_beta" and rounds.round_leaf_coef):
            continue
        raise UserError(
            f"{name} {getattr(config, name)} is a setting of the training on pairs, and these are rounds: "
            + (f"give {instead}, or rounds 0" if instead else "leave it out, or give rounds 0")
        )


def _patient_of(rewards: RewardStore, patient: LoadedModel | None, base: LoadedModel) -> LoadedModel:
    """The patient, loaded beside the base if need be; UserError if the rewards are another one's."""
    patient = patient or load_model(str(rewards.manifest["patient"]), **placement_of(base))
    if patient.fingerprint.get("model") != rewards.fingerprint.get("model"):
        raise UserError(
            f"{patient.spec} is not the patient that gave the rewards in {rewards.folder} "
            f"({rewards.manifest['patient']}); rounds need that one to judge answers"
        )
    return patient


def _silent(what: str, units: int) -> None:
    """Tells nobody."""
