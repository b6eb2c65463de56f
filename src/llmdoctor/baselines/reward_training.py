"""A reward model by TRL's trainer (Bradley-Terry), on the token ids of a reward store.

The score stands in float32 on the doctor's LoRA on the base model, and is read at a response's very last token.

Shapes: B pairs, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback

from llmdoctor.baselines.training import (
    TOKENS_AT_ONCE,
    AdapterTraining,
    BaselineOptions,
    longest_response,
    lora_config,
    made_from,
    open_run,
    place,
    require_trl,
    token_rows,
)
from llmdoctor.data.chat import ChatEncoder
from llmdoctor.errors import UserError
from llmdoctor.models.loading import LoadedModel, name_base
from llmdoctor.models.reward_model import RewardModelConfig, base_classifier, save_reward_model
from llmdoctor.rewards.store import RewardStore
from llmdoctor.tfpo.trainer import preference_metrics

EVAL_PAIRS = 16
"""Held-out pairs in one forward pass, at most."""


def train_reward_model(
    base: LoadedModel,
    rewards: RewardStore,
    output: str | Path,
    options: BaselineOptions | None = None,
    *,
    resume: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train a reward model on `base` and write it to `output`, for `load_reward_model`.

    Args:
        base: its backbone; it is trained in place.
        rewards: whose token ids it is trained on; their rewards are not looked at.
        output: the folder; checkpoints go to `output/checkpoints`, ten in all.
        options: the budget; `beta` must be None.
        resume: go on from a checkpoint, or take a finished result; False starts anew.
        callbacks: for the progress of the training.

    Returns:
        The folder; at once if it holds the finished result of these settings.

    Raises:
        UserError: TRL is not installed, a β, rewards that cannot be carried
            over to the base's tokens, or too few pairs.
        FingerprintMismatch: the folder was made with other settings, rewards or another base.
        TrainingDiverged: loss or gradient is not finite.
    """
    options = options or BaselineOptions()
    require_trl("A reward model")
    if options.beta is not None:
        raise UserError(f"a reward model has no beta, got {options.beta}; leave it None")
    config = RewardModelConfig(**made_from(base, rewards, "reward_model", options, None))
    run = open_run(base, rewards, Path(output), config, options.eval_fraction, resume)
    if run.done:
        return run.output
    trainer = reward_trainer(base, run.train_set, options, run.checkpoints, callbacks)
    trainer.train(resume_from_checkpoint=run.resume_from)
    model = trainer.accelerator.unwrap_model(trainer.model)
    encoder = ChatEncoder.for_model(base.model, base.tokenizer)
    config.metrics = {**_held_out_metrics(model, run.held_out, encoder, trainer.data_collator), **run.counts}
    place(run, config, lambda folder: save_reward_model(folder, model, config))
    return run.output


class Float32Score(nn.Linear):
    """A score with float32 weights on hidden states of any dtype: in bfloat16 small steps would round to nothing."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] -> [..., 1] float32."""
        return super().forward(input.float())


def reward_trainer(
    base: LoadedModel,
    rows: Any,
    options: BaselineOptions,
    checkpoints: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> Any:
    """TRL's `RewardTrainer` on rows of a reward store."""
    from datasets import Dataset
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    class TokenRewardTrainer(AdapterTraining, RewardTrainer):
        pass

    rows_of_ids = token_rows(rows, ChatEncoder.for_model(base.model, base.tokenizer))
    config = RewardConfig(
        **options.training_arguments(checkpoints, base.model.device.type == "cpu", longest_response(rows_of_ids)),
        # The defaults would drop long rows, recompute activations and autocast.
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
    )
    classifier = base_classifier(base, seed=options.seed)
    score = Float32Score(classifier.score.in_features, 1, bias=False, device=classifier.score.weight.device)
    score.load_state_dict(classifier.score.state_dict())
    classifier.score = score
    columns = _responses(rows_of_ids)
    trainer = TokenRewardTrainer(
        model=classifier,
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=base.tokenizer,
        peft_config=lora_config(classifier, options, "SEQ_CLS", modules_to_save=["score"]),
        callbacks=list(callbacks),
    )
    name_base(trainer.model.active_peft_config, base.spec)
    _pad_with(trainer, base, columns)
    return trainer


def _responses(columns: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Prompt and completion of both sides, joined by id."""
    return {
        name: [prompt + ids for prompt, ids in zip(columns["prompt_ids"], columns[name], strict=True)]
        for name in ("chosen_ids", "rejected_ids")
    }


def _pad_with(trainer: Any, base: LoadedModel, columns: dict[str, list[list[int]]]) -> None:
    """Pad with an id at which no row ends.

    transformers takes the score at the rightmost token that is not padding by its id. Where the padding token is the
    end-of-turn token, as SmolLM2's is, a whole response would be read one token too early.
    """
    ends = {ids[-1] for rows in columns.values() for ids in rows}
    free = next(index for index in range(base.model.config.get_text_config().vocab_size) if index not in ends)
    trainer.model.config.get_text_config().pad_token_id = free
    trainer.data_collator.pad_token_id = free
    # Else training begins by setting the padding token back to the tokenizer's.
    trainer.processing_class = None


@torch.no_grad()
def _held_out_metrics(model: Any, rows: Any | None, encoder: ChatEncoder, collate: Any) -> dict[str, float]:
    """`preference_metrics` of the rewards of held-out rows; none for no rows."""
    if rows is None:
        return {}
    model.eval()
    scores = []
    fitting = TOKENS_AT_ONCE // (2 * longest_response(token_rows(rows[:], encoder)))
    at_once = max(1, min(EVAL_PAIRS, fitting))
    for start in range(0, len(rows), at_once):
        columns = _responses(token_rows(rows[start : start + at_once], encoder))
        batch = collate([dict(zip(columns, pair, strict=True)) for pair in zip(*columns.values(), strict=True)])
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        scores.append(model(**inputs, use_cache=False).logits.float().view(2, -1).T.cpu())
    totals = torch.cat(scores).numpy()
    return preference_metrics(EvalPrediction(predictions=totals, label_ids=np.ones(len(totals))))
