"""GenARM (Xu et al. 2024, arXiv 2410.08193): an autoregressive reward model, on the trainer of stage 2.

Its reward is a language model's own log-likelihood, r(x, y) = Σ_t log π_r(y_t | x, y_<t), trained to tell pairs apart
with no reference beside it. It guides as a product: π_patient · π_r^β.

Shapes: B pairs, 2B responses (the chosen first), L completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from llmdoctor.baselines.training import BaselineOptions, finish_doctor, made_from, open_run
from llmdoctor.models.doctor import Doctor, DoctorConfig
from llmdoctor.models.loading import LoadedModel
from llmdoctor.rewards.store import RewardStore
from llmdoctor.tfpo.config import TFPOConfig
from llmdoctor.tfpo.options import lora_arguments
from llmdoctor.tfpo.trainer import TFPOTrainer

BETA = 0.05
"""β_r that the authors' code trains with. Totals are summed over tokens: their length normalisation is an
experiment that is off."""


def genarm_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """−log σ(β_r (log π_r(y⁺|x) − log π_r(y⁻|x))), the paper's objective.

    Args:
        chosen, rejected: [B] log-likelihoods of whole responses.
        beta: β_r.

    Returns:
        [B].
    """
    return -nn.functional.logsigmoid(beta * (chosen - rejected))


def train_genarm(
    base: LoadedModel,
    rewards: RewardStore,
    output: str | Path,
    options: BaselineOptions | None = None,
    *,
    dimension: str = "",
    resume: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train an autoregressive reward model on `base` and write it to `output` as a doctor's folder.

    Read it with `load_guide(output, patient, form="product")`. Checkpoints, resuming, reuse of a finished folder and
    errors are as `train_dpo`'s.

    Args:
        base: its base model; it is trained in place.
        rewards: whose token ids it is trained on; their rewards are not looked at.
        output: the folder.
        options: the budget; `beta` None is `BETA`.
        dimension: a name for what it is for; the faces' name if empty.
        resume: go on from a checkpoint, or take a finished result; False starts anew.
        callbacks: for the progress of the training.

    Returns:
        The folder.
    """
    options = options or BaselineOptions()
    beta = BETA if options.beta is None else options.beta
    made = made_from(base, rewards, "genarm", options, beta)
    config = DoctorConfig(dimension=dimension or rewards.dimension, **made)
    run = open_run(base, rewards, Path(output), config, options.eval_fraction, resume)
    if run.done:
        return run.output
    lora = lora_arguments(base.model, options.doctor_options())
    doctor = Doctor.from_base(base, lora=lora, dimension=config.dimension, seed=options.seed)
    doctor.doctor_config = config
    doctor.value_head.requires_grad_(False)
    args = TFPOConfig(**options.training_arguments(run.checkpoints, base.model.device.type == "cpu"))
    trainer = GenARMTrainer(doctor, args, run.train_set, beta=beta, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=run.resume_from)
    finish_doctor(run, doctor, config)
    return run.output


class GenARMTrainer(TFPOTrainer):
    """`TFPOTrainer` with GenARM's objective: same batches, chunked log-probs, checkpoints and guard.

    Args:
        model: a `Doctor`; its value head is not trained.
        args: of which the settings of the flow have no effect.
        train_dataset: rows of a reward store.
        beta: β_r.
    """

    def __init__(self, model: Doctor, args: TFPOConfig, train_dataset: Any, *, beta: float, **kwargs: Any) -> None:
        super().__init__(model, args, None, **kwargs)
        # Given to the parent, the rows would be read by a reference that this objective does not have.
        self.train_dataset = train_dataset
        self.beta = beta

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over pairs of `genarm_loss`; of a part of a batch, times its share in it."""
        logps, _ = model(
            inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], inputs["prompt_width"]
        )
        totals = logps.sum(-1).view(2, -1)
        loss = genarm_loss(totals[0], totals[1], self.beta).mean()
        rewards = totals.detach().T
        if model.training:
            self._record(rewards)
        loss = loss * self._share
        return (loss, rewards) if return_outputs else loss
