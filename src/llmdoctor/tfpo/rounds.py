"""On-policy rounds: prompts are answered under the doctor's guidance, the patient's read-out rewards every token.

On pairs a doctor learns from what the patient says; guided by it, the patient writes other texts, and there the doctor
has learned nothing. So in each round prompts are answered as they will be, two answers a prompt, and it is trained on
those: by the patient with the doctor as its guide at β = 1, which is the doctor alone where its base is the patient.
Nobody has labelled them: the rewards are the read-out's (`rewards.readout`), whose R is a Bradley-Terry reward in nats,
so that zero loss means

    π̂(y|x) ∝ π_ref(y|x) · exp(R(x, y) / η),        the optimum of RLHF with KL weight η.

Sub-trajectory balance is exact on answers from anywhere (Madan et al. 2023, arXiv 2209.12782), so an answer may be
another model's, and a few steps older than the weights that it trains. Measured in docs/research/2026-11-25-rounds.md.
Shapes: B prompts, 2B answers, L tokens.
"""

from __future__ import annotations

import copy
import json
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow.parquet as pq
import torch
from accelerate.utils import gather_object
from datasets import Dataset as Rows
from torch.utils.data import Dataset, SequentialSampler

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.decoding.adapter import Adapter
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import Guide
from llmdoctor.decoding.memory import give_back
from llmdoctor.decoding.network import network_of
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.errors import UserError
from llmdoctor.files import atomic_path
from llmdoctor.models.context import context_of
from llmdoctor.models.doctor import ADAPTER_FOLDER, Doctor
from llmdoctor.models.loading import LoadedModel
from llmdoctor.models.vocab import Vocabulary
from llmdoctor.rewards.readout import Readout
from llmdoctor.rewards.store import SIDES
from llmdoctor.rewards.transfer import carry_onto
from llmdoctor.tfpo.config import OBJECTIVES, TFPOConfig
from llmdoctor.tfpo.trainer import TFPOTrainer, with_reference

T = TypeVar("T")


@dataclass(frozen=True)
class RoundOptions:
    """How a doctor learns from answers under its own guidance.

    Attributes:
        rounds: how many times prompts are answered under its guidance and it learns from that; 0 learns from the
            pairs instead.
        pairs_weight: with rounds, share in [0, 1) of a second doctor, which learns from the pairs, in the mean of both,
            which errs less than either; 0 trains none.
        pairs_objective: with rounds, what that second doctor learns: none the pairs' labels alone, by the leaf loss;
            subtb or squared_error their token rewards as well. The objective is then that of the rounds.
        pairs_first: learn from the pairs before the rounds, in one and the same doctor, instead of merging two.
        round_prompts: prompts a round, drawn from those of the pairs and rounded up to whole batches; each is answered
            twice.
        round_eta: η of the read-out's rewards, which are in nats: DPO's β. Smaller tilts harder and takes more rounds.
        round_branch_coef: λ_branch, weight of the balance between the two answers to a prompt.
        round_leaf_coef: λ_leaf, weight of DPO's loss on them, with the one that the read-out likes better as the
            chosen one; with objective none and no other weight a round is one of online DPO (arXiv 2402.04792).
        round_max_new_tokens: longest answer, in tokens of whoever answers; 0 is as long as the longest response of the
            pairs.
        round_batch_size: answers drawn together; changes nothing but speed, up to rounding.
    """

    rounds: int = 4
    pairs_weight: float = 0.5
    pairs_objective: str = "none"
    pairs_first: bool = False
    round_prompts: int = 300
    round_eta: float = 0.6
    round_branch_coef: float = 1.0
    round_leaf_coef: float = 0.0
    round_max_new_tokens: int = 0
    round_batch_size: int = 128

    def __post_init__(self) -> None:
        for name, least in (("rounds", 0), ("round_prompts", 1), ("round_max_new_tokens", 0), ("round_batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.round_eta < math.inf:
            raise UserError(f"round_eta must be positive and finite, got {self.round_eta}")
        if not 0 <= self.pairs_weight < 1:
            raise UserError(
                f"pairs_weight must lie in [0, 1), got {self.pairs_weight}; rounds 0 learns from pairs only"
            )
        for name in ("round_branch_coef", "round_leaf_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.pairs_objective not in OBJECTIVES:
            raise UserError(f"pairs_objective must be one of {', '.join(OBJECTIVES)}, got {self.pairs_objective!r}")

    @property
    def merges(self) -> bool:
        """Whether two doctors are trained and merged: of the rounds, and of the pairs."""
        return self.rounds > 0 and self.pairs_weight > 0 and not self.pairs_first


class TokenJudge(Protocol):
    """Whatever rewards the tokens of answers that nobody has labelled."""

    def __call__(
        self, prompts: Sequence[Any], answers: Sequence[list[int]], ended: Sequence[bool]
    ) -> list[list[float]]:
        """Rewards in nats of each token of each answer (ids of the doctor's) to each conversation."""


class ReadoutJudge:
    """A patient's read-out as the judge of a doctor's answers, whatever tokenizer that one has.

    Args:
        readout: of the patient.
        base: the doctor's base.
    """

    def __init__(self, readout: Readout, base: LoadedModel) -> None:
        self.readout = readout
        self.encoder = ChatEncoder.for_model(base.model, base.tokenizer)
        patient = readout.patient
        same = patient.fingerprint["tokenizer"] == base.fingerprint["tokenizer"]
        self.vocabulary = None if same else Vocabulary.of(self.encoder)

    def __call__(
        self, prompts: Sequence[Any], answers: Sequence[list[int]], ended: Sequence[bool]
    ) -> list[list[float]]:
        """See `TokenJudge`."""
        reader = self.readout.encoder
        read = list(answers)
        if self.vocabulary is not None:
            texts = [self.encoder.decode(ids[:-1] if end else ids) for ids, end in zip(answers, ended, strict=True)]
            read = [reader.completion(text, end).ids for text, end in zip(texts, ended, strict=True)]
        found = [
            rewards.tolist()
            for rewards in self.readout.token_rewards([reader.prompt_ids(messages) for messages in prompts], read)
        ]
        if self.vocabulary is None:
            return found
        return [
            carry_onto(ids, end, reader.token_texts(own), rewards, self.vocabulary)
            for ids, end, own, rewards in zip(answers, ended, read, found, strict=True)
        ]


class RoundsTrainer(TFPOTrainer):
    """`TFPOTrainer` on answers under the doctor's guidance, drawn anew at the start of every round.

    A round's rows are kept in a file before the first step is taken on them, and a checkpoint is written after the last
    one, so a run that was killed ends with the weights that it would have had. Several processes answer a share of a
    round's prompts each.

    Args:
        model: a LoRA `Doctor`.
        args: as for the pairs; what differs in rounds is set here.
        options: how many rounds, and what is in them.
        prompts: conversations as JSON, from which each round's are drawn.
        judge: gives rewards.
        max_new_tokens: longest answer.
        patient: the model that answers, guided by the doctor; None where it is the doctor's own base.
        eval_dataset: rows of pairs.
        told: called with what begins and how many answers it draws, then with "" and the number of those just drawn.

    Raises:
        UserError: a doctor without a reference below it, or no prompts; while training, if no prompt was answered.
    """

    def __init__(
        self,
        model: Doctor,
        args: TFPOConfig,
        options: RoundOptions,
        prompts: Sequence[str],
        judge: TokenJudge,
        max_new_tokens: int,
        *,
        patient: LoadedModel | None = None,
        eval_dataset: Any = None,
        told: Callable[[str, int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        if not model.doctor_config.lora:
            raise UserError("rounds need a LoRA doctor: a fully trained one keeps no reference to tilt from")
        if not prompts:
            raise UserError("rounds need prompts, and there are none")
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.steps_a_round = -(-min(options.round_prompts, len(prompts)) // batch)
        self.prompts_a_round = self.steps_a_round * batch
        args, steps = copy.copy(args), self.steps_a_round * options.rounds
        args.num_train_epochs, args.max_steps = 1.0, min(args.max_steps, steps) if args.max_steps > 0 else steps
        args.eta, args.branch_coef = options.round_eta, options.round_branch_coef
        args.leaf_coef, args.value_coef = options.round_leaf_coef, 0.0
        args.eval_strategy, args.save_strategy, args.save_steps = "no", "steps", self.steps_a_round
        super().__init__(model, args, None, eval_dataset, **kwargs)
        self.train_dataset = _Places(self.prompts_a_round * options.rounds)
        self.options = options
        self.prompts = list(prompts)
        self.judge = judge
        self.patient = patient
        self.max_new_tokens = max_new_tokens
        self.told = told
        self._collate_rows: Any = self.data_collator  # type: ignore[has-type]
        self.data_collator = self._collate
        self._open: tuple[int, list[dict[str, Any]]] | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """Places in their order: each round's rows are drawn in a random one."""
        return SequentialSampler(self.train_dataset)

    def _collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Places only: their rows may not be there before the step is taken."""
        if isinstance(rows[0], int):
            return {"places": torch.tensor(rows)}
        batch: dict[str, Any] = self._collate_rows(rows)
        return batch

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "places" in inputs:
            places: list[int] = inputs["places"].tolist()
            rows = self.rows(places[0] // self.prompts_a_round)
            inputs = self._collate_rows([rows[place % self.prompts_a_round] for place in places])
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        return prepared

    def rows(self, number: int) -> list[dict[str, Any]]:
        """The rows of a round, drawn with the doctor as it is now if they are not there yet."""
        if self._open is None or self._open[0] != number:
            path = Path(self.args.output_dir) / "rows" / f"{number:03d}.parquet"
            if not self._anywhere(torch.tensor(path.is_file(), device=self.args.device)):
                found = self._round(number)
                # One of all machines' processes: they share the folder.
                with self.args.main_process_first(local=False, desc=f"round {number}"):
                    if self.args.process_index == 0:
                        with atomic_path(path) as partial:
                            pq.write_table(Rows.from_list(found).data.table, partial)
            self._open = number, pq.read_table(path).to_pylist()
        return self._open[1]

    def _round(self, number: int) -> list[dict[str, Any]]:
        """All processes' rows of a round, in the order in which its prompts were drawn."""
        answered = self._from_all(lambda: self._draw(number))
        rewards = [total for _, totals in answered for total in totals]
        rows = [row for _, row in sorted((pair for pairs, _ in answered for pair in pairs), key=lambda pair: pair[0])]
        if not rows:
            raise UserError(
                f"round {number + 1}: none of {self.prompts_a_round} prompts has two answers that say something; are "
                "they too long?"
            )
        self.log(
            {
                "round": float(number),
                "round_reward": sum(reward for reward, _ in rewards) / len(rewards),
                "round_length": sum(length for _, length in rewards) / len(rewards),
            }
        )
        # Where a context was full before a word was said, others stand in.
        return [rows[place % len(rows)] for place in range(self.prompts_a_round)]

    def _from_all(self, work: Callable[[], T]) -> list[T]:
        """What each of the processes makes of its own share; where one of them fails, all stop."""
        if self.args.world_size == 1:
            return [work()]
        found, error = None, None
        try:
            found = work()
        except Exception as failure:
            # The others wait for what this one says.
            error = failure
        said: list[str] = gather_object([f"{type(error).__name__}: {error}" if error else ""])
        if error:
            raise error
        failed = [f"process {place} stopped: {message}" for place, message in enumerate(said) if message]
        if failed:
            raise UserError("; ".join(failed))
        parts: list[T] = gather_object([found])
        return parts

    def _draw(self, number: int) -> tuple[list[tuple[int, dict[str, Any]]], list[tuple[float, int]]]:
        """This process's rows by the places of their prompts, and of each answer the reward and the tokens."""
        doctor: Doctor = self.accelerator.unwrap_model(self.model)
        rng = random.Random(f"{self.args.seed} {number}")
        chosen = rng.sample(self.prompts, len(self.prompts))
        chosen = [chosen[place % len(chosen)] for place in range(self.prompts_a_round)]
        seeds = [[rng.getrandbits(48) for _ in SIDES] for _ in chosen]
        own = range(self.args.process_index, len(chosen), self.args.world_size)
        conversations = [tuple(json.loads(chosen[place])) for place in own for _ in SIDES]
        training = doctor.training
        doctor.eval()
        give_back()
        told = self.told
        if told:
            told(f"round {number + 1} of {self.options.rounds}: answers", len(conversations))
        answers = draw_answers(
            doctor,
            conversations,
            [seed for place in own for seed in seeds[place]],
            self.max_new_tokens,
            self.options.round_batch_size,
            patient=self.patient,
            told=None if told is None else lambda drawn: told("", drawn),
        )
        rewards = self.judge(conversations, [ids for ids, _ in answers], [ended for _, ended in answers])
        rows: dict[int, dict[str, Any]] = {}
        for first, place in zip(range(0, len(answers), 2), own, strict=True):
            row: dict[str, Any] = {"prompt": chosen[place]}
            better_first = sorted((first, first + 1), key=lambda index: -sum(rewards[index]))
            for side, index in zip(SIDES, better_first, strict=True):
                row[f"{side}_ids"], row[f"{side}_terminal"] = answers[index]
                row[f"{side}_rewards"] = rewards[index]
            if row["chosen_ids"] and row["rejected_ids"]:
                rows[place] = row
        if rows:
            read = Rows.from_list(list(rows.values()))
            read = with_reference(doctor, read, self._collate_rows, self.args.per_device_eval_batch_size)
            rows = dict(zip(rows, read.to_list(), strict=True))
        doctor.train(training)
        give_back()
        return list(rows.items()), [(sum(own_rewards), len(own_rewards)) for own_rewards in rewards]


def draw_answers(
    doctor: Doctor,
    conversations: Sequence[tuple[Any, ...]],
    seeds: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    *,
    patient: LoadedModel | None = None,
    told: Callable[[int], None] | None = None,
) -> list[tuple[list[int], bool]]:
    """An answer to each conversation, in the doctor's ids, and whether it ended by itself.

    By the doctor alone, or by the `patient` with the doctor as its guide (ratio form, β = 1), whose words are then
    split anew if it has another tokenizer. Drawn from a copy of the doctor, which is gone afterwards.

    Raises:
        UserError: a prompt that leaves no room in the context.
    """
    decoder = answering(doctor, patient, batch_size)
    betas = dict.fromkeys(decoder.names, 1.0)
    requests = [
        Request(messages, betas=betas, sampling=SamplingParams(max_new_tokens=max_new_tokens, seed=seed))
        for messages, seed in zip(conversations, seeds, strict=True)
    ]
    done = decoder.generate(requests, on_done=None if told is None else lambda _, __: told(1))
    ended = [completion.finish_reason == "stop" for completion in done]
    if all(lane.translation is None for lane in decoder.lanes):
        return [(completion.token_ids, end) for completion, end in zip(done, ended, strict=True)]
    answers = []
    for messages, completion, end in zip(conversations, done, ended, strict=True):
        # An answer that was cut may end within a character.
        text = completion.text if end else completion.text.rstrip("\ufffd")
        room = context_of(doctor.causal_lm) - len(doctor.encoder.prompt_ids(messages))
        split = doctor.encoder.completion(text, end, max(0, room))
        answers.append((split.ids, split.terminal))
    return answers


def answering(doctor: Doctor, patient: LoadedModel | None, batch_size: int) -> GuidedDecoder:
    """What answers a round's prompts: a copy of the doctor, or the patient with such a copy as its guide.

    Raises:
        UserError: a doctor whose tokens cannot be translated into the patient's.
    """
    if patient is None:
        return GuidedDecoder(copy.deepcopy(doctor).merged(), max_batch_size=batch_size)
    config = doctor.doctor_config
    bare = copy.deepcopy(doctor.lm).unload().eval()
    base = LoadedModel(bare, doctor.tokenizer, config.base, dict(config.base_fingerprint))
    adapter = None
    if network_of(bare.get_decoder()) is not None:
        with tempfile.TemporaryDirectory() as scratch:
            doctor.save_weights(Path(scratch))
            adapter = Adapter.load(Path(scratch) / ADAPTER_FOLDER, bare)
    # One pass for doctor and reference where it can be had.
    guiding = base if adapter is not None else copy.deepcopy(doctor).merged()
    return GuidedDecoder(patient, [Guide("doctor", guiding, base, adapter=adapter)], max_batch_size=batch_size)


class _Places(Dataset[int]):
    """The numbers below `count`."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> int:
        return place
