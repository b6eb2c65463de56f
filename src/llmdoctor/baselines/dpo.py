"""DPO (Rafailov et al. 2023, arXiv 2305.18290) by TRL's trainer, on the token ids of a reward store."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llmdoctor.baselines.training import (
    AdapterTraining,
    BaselineOptions,
    finish_doctor,
    longest_response,
    lora_config,
    made_from,
    open_run,
    require_trl,
    token_rows,
)
from llmdoctor.data.chat import ChatEncoder
from llmdoctor.models.doctor import Doctor, DoctorConfig
from llmdoctor.models.loading import LoadedModel, name_base
from llmdoctor.rewards.store import RewardStore

BETA = 0.1
"""β of the paper's experiments, and TRL's default."""


def train_dpo(
    base: LoadedModel,
    rewards: RewardStore,
    output: str | Path,
    options: BaselineOptions | None = None,
    *,
    dimension: str = "",
    resume: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train `base` with DPO and write it to `output` as a doctor's folder.

    `load_guide(output, patient)` makes it a log-ratio guide; with `form="product"`, α = 0 and β = 1 decode from it as
    a plain policy. Reference log-probs are computed once, before the first step.

    Args:
        base: policy and, adapter switched off, reference; it is trained in place.
        rewards: whose token ids it is trained on; their rewards are not looked at.
        output: the folder; checkpoints go to `output/checkpoints`, ten in all.
        options: the budget; `beta` None is `BETA`.
        dimension: a name for what it is for; the faces' name if empty.
        resume: go on from a checkpoint, or take a finished result; False starts anew.
        callbacks: for the progress of the training.

    Returns:
        The folder; at once if it holds the finished result of these settings.

    Raises:
        UserError: TRL is not installed, rewards that cannot be carried over to the
            base's tokens, or too few pairs.
        FingerprintMismatch: the folder was made with other settings, rewards or another base.
        TrainingDiverged: loss or gradient is not finite.
    """
    options = options or BaselineOptions()
    require_trl("DPO")
    beta = BETA if options.beta is None else options.beta
    made = made_from(base, rewards, "dpo", options, beta)
    config = DoctorConfig(dimension=dimension or rewards.dimension, **made)
    run = open_run(base, rewards, Path(output), config, options.eval_fraction, resume)
    if run.done:
        return run.output
    trainer = dpo_trainer(base, run.train_set, options, beta, run.checkpoints, callbacks)
    trainer.train(resume_from_checkpoint=run.resume_from)
    # TRL lays a forward of its own over the model's; a doctor has its own ways to log-probs.
    vars(base.model).pop("forward", None)
    doctor = Doctor(trainer.accelerator.unwrap_model(trainer.model), base.tokenizer, config)
    finish_doctor(run, doctor, config)
    return run.output


def dpo_trainer(
    base: LoadedModel,
    rows: Any,
    options: BaselineOptions,
    beta: float,
    checkpoints: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> Any:
    """TRL's `DPOTrainer` on rows of a reward store, reference log-probs computed."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class TokenDPOTrainer(AdapterTraining, DPOTrainer):
        def _precompute_ref_logps(self, *args: Any) -> Any:
            # The first that is read with TRL's head, once it is there.
            if base.model.device.type == "cpu":
                score_labelled_positions(base.model)
            with _no_bars():
                return super()._precompute_ref_logps(*args)

    columns = token_rows(rows, ChatEncoder.for_model(base.model, base.tokenizer))
    config = DPOConfig(
        **options.training_arguments(checkpoints, base.model.device.type == "cpu", longest_response(columns)),
        beta=beta,
        loss_type=["sigmoid"],
        precompute_ref_log_probs=True,
        # The defaults would cut long rows, recompute activations and autocast.
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
    )
    trainer = TokenDPOTrainer(
        model=base.model,
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=base.tokenizer,
        peft_config=lora_config(base.model, options, "CAUSAL_LM"),
        callbacks=list(callbacks),
    )
    name_base(trainer.model.active_peft_config, base.spec)
    return trainer


def score_labelled_positions(model: Any) -> None:
    """Let TRL's head read the positions that have a label, as it does by itself where Triton is at hand.

    Elsewhere TRL projects prompts and padding on the vocabulary, too, and throws the result away: of real dialogues,
    nine positions in ten. Same log-probs, up to rounding.

    Args:
        model: whose `forward` is TRL's, put there by its trainer.
    """
    whole = model.forward

    @functools.wraps(type(model).forward)
    def forward(*args: Any, labels: Any = None, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return whole(*args, labels=labels, **kwargs)
        shifted = labels[:, 1:]
        mask = shifted != -100

        def labelled(_module: Any, _args: Any, backbone: Any) -> Any:
            backbone.last_hidden_state = backbone.last_hidden_state[:, :-1][mask][None]
            return backbone

        hook = model.base_model.register_forward_hook(labelled)
        try:
            outputs = whole(*args, shift_labels=shifted[mask][None], fused_lm_head=True, **kwargs)
        finally:
            hook.remove()
        for name, value in outputs.items():
            if value is not None and value.dim() == 2:
                outputs[name] = value.new_zeros(mask.shape).masked_scatter(mask, value)
        return outputs

    model.forward = forward


@contextmanager
def _no_bars() -> Iterator[None]:
    """TRL draws this bar whatever its arguments say; it looks at the environment alone."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before
