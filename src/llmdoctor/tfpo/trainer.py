"""Stage 2: token rewards to a doctor, on `transformers.Trainer`.

Shapes: B pairs, 2B responses (the chosen first), L completion tokens, N = L + 1 states.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer
from transformers.trainer import TRAINER_STATE_NAME

from llmdoctor.data.collate import RewardCollator, in_parts
from llmdoctor.errors import TrainingDiverged, UserError
from llmdoctor.models.doctor import Doctor
from llmdoctor.models.loading import need_one_gpu
from llmdoctor.rewards.face_scorer import FaceScorer
from llmdoctor.rewards.store import SIDES
from llmdoctor.tfpo.config import TFPOConfig
from llmdoctor.tfpo.flows import balance_potential, state_mask
from llmdoctor.tfpo.losses import (
    branch_balance_loss,
    leaf_discrimination_loss,
    squared_error_loss,
    subtb_loss,
    value_discrimination_loss,
)

Progress = Callable[[int], None]


class TFPOTrainer(Trainer):
    """Trains a doctor so that probability flow balances over every sub-trajectory of tokens.

    Prompts are read once for both responses where the model allows it (`Doctor.packs_pairs`).

    Args:
        model: a `Doctor`.
        args: a `TFPOConfig`.
        train_dataset, eval_dataset: rows of a reward store (`RewardStore.dataset()`). The reference's log-probs are
            computed here, once, before the first step.
        progress: called with the number of pairs whose reference log-probs have just been computed.

    Raises:
        TrainingDiverged: loss or gradient is not finite. The last weights that worked are kept as a checkpoint.
        UserError: several GPUs in one process, or arguments for another kind of device than the doctor is on.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: Doctor,
        args: TFPOConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> None:
        need_one_gpu(model.causal_lm, args.n_gpu)
        if args.device.type != model.causal_lm.device.type:
            raise UserError(
                f"the doctor is on {model.causal_lm.device.type} and would be moved to {args.device.type}, where what "
                "it is trained beside is not: load it there, or give use_cpu"
            )
        collator = RewardCollator(model.encoder, args.max_prompt_length, packed=model.packs_pairs)
        model.detach_value = args.value_detach
        datasets = [
            None if rows is None else with_reference(model, rows, collator, args.per_device_eval_batch_size, progress)
            for rows in (train_dataset, eval_dataset)
        ]
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=datasets[0],
            eval_dataset=datasets[1],
            processing_class=model.tokenizer,
            compute_metrics=preference_metrics,
            **kwargs,
        )
        # Values since the last log line, and of how much of a batch each is.
        self._window: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._share = 1.0
        self._sound: tuple[int, list[Tensor]] | None = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of the balance loss plus λ_value, λ_leaf and λ_branch times the value, leaf and branch losses.

        Of a part of a batch, times its share in it.
        """
        logps, log_v = model(
            inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], inputs["prompt_width"]
        )
        args: TFPOConfig = self.args
        balance = self._balance_loss(logps, log_v, inputs, args).mean()
        value = _pair_value_loss(log_v, inputs, args.value_margin, args.terminal_anchor).mean()
        rewards = _implicit_rewards(logps, inputs)
        leaf = leaf_discrimination_loss(rewards[:, 0], rewards[:, 1], args.leaf_beta).mean()
        loss = balance + args.value_coef * value + args.leaf_coef * leaf
        if args.branch_coef:
            loss = loss + args.branch_coef * self._branch_loss(logps, inputs, args).mean()
        margins = rewards.detach()
        if model.training:
            self._record(margins, balance_loss=balance, value_loss=value, leaf_loss=leaf)
        loss = loss * self._share
        return (loss, margins) if return_outputs else loss

    @staticmethod
    def _balance_loss(logps: Tensor, log_v: Tensor, inputs: dict[str, Any], args: TFPOConfig) -> Tensor:
        mask = inputs["completion_mask"]
        if args.objective == "none":
            return logps.new_zeros(logps.shape[0])
        if args.objective == "squared_error":
            return squared_error_loss(logps, inputs["ref_logps"], inputs["token_rewards"], mask, args.eta)
        potential = balance_potential(
            logps,
            inputs["token_rewards"],
            log_v,
            mask,
            inputs["terminal"],
            eta=args.eta,
            ref_logps=inputs["ref_logps"] if args.reference_anchor else None,
            terminal_anchor=args.terminal_anchor,
        )
        loss = subtb_loss(potential, state_mask(mask), args.subtb_lambda)
        return loss / mask.sum(-1).clamp(min=1) if args.length_normalize else loss

    @staticmethod
    def _branch_loss(logps: Tensor, inputs: dict[str, Any], args: TFPOConfig) -> Tensor:
        return branch_balance_loss(
            logps - inputs["ref_logps"],
            inputs["token_rewards"],
            inputs["completion_mask"],
            args.eta,
            length_normalize=args.length_normalize,
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The gradient of a batch, read in parts where it is large; stops the training where it is no longer finite."""
        inputs = self._prepare_inputs(inputs)
        attention = self.accelerator.unwrap_model(model).causal_lm.config.get_text_config()._attn_implementation
        parts = in_parts(inputs, self.args.max_tokens_at_once, keeps_scores=attention == "eager")
        pairs = len(inputs["divergence"])
        loss: Tensor | None = None
        for number, (places, part) in enumerate(parts, 1):
            self._share = len(places) / pairs
            # Several processes add up their gradients once a batch: they may read it in different numbers of parts.
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                found: Tensor = super().training_step(model, part, num_items_in_batch)
            loss = found if loss is None else loss + found
        self._share = 1.0
        assert loss is not None
        finite = torch.isfinite(loss)
        # Under fp16 infinite gradients are how the scaler finds its scale; it skips those steps itself.
        if self.accelerator.scaler is None:
            gradients = [parameter.grad for parameter in self._trained() if parameter.grad is not None]
            finite = finite & torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        # All processes stop together: to save is something that they do together.
        if self._anywhere(~finite):
            self._stop_diverged(loss, model, inputs)
        if self._sound is None or self._sound[0] != self.state.global_step:
            self._sound = (self.state.global_step, [parameter.detach().clone() for parameter in self._trained()])
        return loss

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _stop_diverged(self, loss: Tensor, model: nn.Module, inputs: dict[str, Any]) -> None:
        failed = self.state.global_step + 1
        self.model.zero_grad(set_to_none=True)
        by_rewards = self._anywhere(torch.tensor(self._rewards_broke_it(loss, model, inputs), device=loss.device))
        if self._sound is not None and not by_rewards:
            # The step before broke the weights, and it shows only now: go back to those that gave a finite loss.
            self.state.global_step, kept = self._sound
            with torch.no_grad():
                for parameter, values in zip(self._trained(), kept, strict=True):
                    parameter.copy_(values)
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if not (folder / TRAINER_STATE_NAME).is_file():
            self._save_checkpoint(self.model, trial=None)
        raise TrainingDiverged(
            f"training diverged at step {failed}: loss or gradient is not finite. The last good weights, after step "
            f"{step}, are in {folder}; lower learning_rate, raise eta, or look for broken rewards with "
            "`llmdoctor inspect`"
        )

    def _rewards_broke_it(self, loss: Tensor, model: nn.Module, inputs: dict[str, Any]) -> bool:
        if torch.isfinite(loss):
            return False
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            # Not by way of what keeps processes in step: only some of them may come by here.
            bare = self.accelerator.unwrap_model(model)
            without = self.compute_loss(bare, {**inputs, "token_rewards": torch.zeros_like(inputs["token_rewards"])})
        return bool(torch.isfinite(without))

    def _anywhere(self, flag: Tensor) -> bool:
        """Whether a flag is up in any of the processes."""
        if self.accelerator.num_processes > 1:
            flag = self.accelerator.reduce(flag.float(), reduction="sum") > 0
        return bool(flag)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss and the implicit rewards log π̂/π_ref of both responses, [B, 2]; read in parts as in training."""
        inputs = self._prepare_inputs(inputs)
        pairs = len(inputs["divergence"])
        losses: list[Tensor] = []
        rewards = torch.empty(pairs, 2, device=inputs["divergence"].device)
        with torch.no_grad():
            # Without a backward pass no layer's scores are kept.
            for places, part in in_parts(inputs, self.args.max_tokens_at_once):
                found, rewards[places] = self.compute_loss(model, part, return_outputs=True)
                losses.append(found * len(places) / pairs)
        loss = torch.stack(losses).sum()
        if prediction_loss_only:
            return loss, None, None
        return loss, rewards, torch.ones(rewards.shape[0], device=rewards.device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of `args.optim`, with the value head as a group of its own learning rate."""
        if self.optimizer is None:
            head = [p for name, p in self.model.named_parameters() if "value_head" in name]
            rest = [p for n, p in self.model.named_parameters() if p.requires_grad and "value_head" not in n]
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [
                {"params": rest, "weight_decay": self.args.weight_decay},
                {"params": head, "weight_decay": 0.0, "lr": self.args.value_learning_rate},
            ]
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last line to what is logged."""
        if "loss" in logs:
            means = {name: np.array(noted).T for name, noted in self._window.items()}
            logs.update({name: float(np.average(values, weights=shares)) for name, (values, shares) in means.items()})
            self._window.clear()
        super().log(logs, start_time)

    def _record(self, rewards: Tensor, **losses: Tensor) -> None:
        """Note a training batch's losses and implicit rewards [B, 2] for the next log line."""
        for name, number in {
            **losses,
            "preference_accuracy": (rewards[:, 0] > rewards[:, 1]).float().mean(),
            "chosen_reward": rewards[:, 0].mean(),
            "rejected_reward": rewards[:, 1].mean(),
        }.items():
            self._window[name].append((float(number.detach()), self._share))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_into(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.accelerator.unwrap_model(model or self.model).load_weights(Path(resume_from_checkpoint))


def preference_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Held-out figures from implicit rewards [pairs, 2] (chosen, rejected)."""
    rewards = np.asarray(prediction.predictions, dtype=np.float64)
    margin = rewards[:, 0] - rewards[:, 1]
    return {
        "preference_accuracy": float((margin > 0).mean() + 0.5 * (margin == 0).mean()),
        "margin": float(margin.mean()),
        "chosen_reward": float(rewards[:, 0].mean()),
        "rejected_reward": float(rewards[:, 1].mean()),
    }


def with_reference(
    doctor: Doctor, dataset: Any, collator: RewardCollator, batch_size: int, progress: Progress | None = None
) -> Any:
    """The dataset with columns `{side}_ref_logps`: the untrained doctor's log-probs of every completion token."""
    names = [f"{side}_ref_logps" for side in SIDES]
    columns: dict[str, list[list[float]]] = {name: [[]] * len(dataset) for name in names}
    doctor.eval()
    with doctor.as_reference() if doctor.doctor_config.lora else nullcontext():
        # One prompt and two responses: what stage 1 does under a face, here under none.
        scorer = FaceScorer(doctor.causal_lm, doctor.encoder, doctor.logits_head, system=None)
        for indices in _by_length(dataset, batch_size):
            rows = [dataset[index] for index in indices]
            completions = [(row[f"{SIDES[0]}_ids"], row[f"{SIDES[1]}_ids"]) for row in rows]
            scored = scorer.score([collator.prompt_ids(row) for row in rows], completions)
            for place, values in enumerate(scored):
                columns[names[place % 2]][indices[place // 2]] = values.tolist()
            if progress:
                progress(len(indices))
    for name in names:
        dataset = dataset.add_column(name, columns[name])
    return dataset


def _by_length(dataset: Any, batch_size: int) -> Iterator[list[int]]:
    columns = (dataset[name] for name in ("prompt", "chosen_ids", "rejected_ids"))
    # A token is about four characters; this only groups similar rows.
    lengths = [len(prompt) // 4 + max(len(one), len(other)) for prompt, one, other in zip(*columns, strict=True)]
    order: Sequence[int] = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for start in range(0, len(order), batch_size):
        yield list(order[start : start + batch_size])


def _implicit_rewards(logps: Tensor, inputs: dict[str, Any]) -> Tensor:
    """[2B, L] -> [B, 2]: Σ_t log π̂/π_ref of the chosen and of the rejected response."""
    totals = (logps - inputs["ref_logps"]).masked_fill(~inputs["completion_mask"], 0.0).sum(-1)
    return totals.view(2, -1).T


def _pair_value_loss(log_v: Tensor, inputs: dict[str, Any], margin: float, terminal_anchor: bool) -> Tensor:
    """Value discrimination at the first divergence: there both responses left the same state by different tokens.

    Not where a response ends right there: the terminal anchor says what V is at an end.
    """
    after = inputs["divergence"] + 1
    lengths = inputs["completion_mask"].sum(-1).view(2, -1)
    if terminal_anchor:
        lengths = lengths - inputs["terminal"].view(2, -1).long()
    chosen, rejected = log_v.view(2, -1, log_v.shape[-1])
    valid = (after <= lengths[0]) & (after <= lengths[1])
    place = after.clamp(max=log_v.shape[-1] - 1)[:, None]
    return value_discrimination_loss(chosen.gather(1, place)[:, 0], rejected.gather(1, place)[:, 0], margin, valid)
