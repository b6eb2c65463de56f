"""Settings of stage 2."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from transformers import SchedulerType, TrainingArguments, get_scheduler

from llmdoctor.errors import UserError, first_line

OBJECTIVES = ("subtb", "squared_error", "none")


@dataclass
class TFPOConfig(TrainingArguments):
    """Arguments of `TFPOTrainer`, on top of `transformers.TrainingArguments`.

    The defaults are this project's own, measured on the benchmarks in docs/; the paper (arXiv 2601.10416) gives no
    values. Its literal form, kept for the ablation, is `reference_anchor=False, terminal_anchor=False, leaf_coef=0` on
    the pairs alone (`RoundOptions(rounds=0)`), with unsigned token rewards (`RewardOptions(signed=False)`).
    """

    learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak learning rate of the policy. LoRA wants about ten times a full model's."}
    )
    value_learning_rate: float = field(
        default=1e-3,
        metadata={
            "help": "Peak learning rate of the value head. Higher lets V absorb reward that the policy then does not "
            "learn."
        },
    )
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the pairs; not of rounds."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Pairs a step and device (two responses each)."}
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Held-out pairs in one forward pass."})
    eta: float = field(
        default=0.5,
        metadata={
            "help": "Reward temperature η on pairs (of rounds: round_eta): zero loss means π̂ ∝ π_ref · exp(Σ r / η). "
            "Smaller tilts harder."
        },
    )
    subtb_lambda: float = field(
        default=1.0,
        metadata={
            "help": "λ of SubTB(λ) (Madan et al. 2023). 1 weighs all sub-trajectories alike, 0 keeps single steps."
        },
    )
    objective: str = field(
        default="subtb",
        metadata={
            "help": "subtb: flow balance over all sub-trajectories; squared_error: the no-flow ablation, log π̂/π_ref "
            "fitted to r/η token by token; none: no flow balance, only the losses whose weights are above 0."
        },
    )
    reference_anchor: bool = field(
        default=True,
        metadata={"help": "Put log π_ref into Q. Without it the optimum ignores the base model's fluency."},
    )
    terminal_anchor: bool = field(
        default=True,
        metadata={"help": "Pin V = 1 at the end of complete responses. Without it V alone can balance the flow."},
    )
    value_coef: float = field(
        default=0.1, metadata={"help": "λ_value, weight of value discrimination; 0 switches it off."}
    )
    value_margin: float = field(
        default=0.1, metadata={"help": "γ in nats: how far V of the preferred next token must stand above the other's."}
    )
    value_detach: bool = field(
        default=False, metadata={"help": "Keep the value head's gradient out of the language model's layers."}
    )
    leaf_coef: float = field(
        default=30.0,
        metadata={
            "help": "λ_leaf, weight of telling the two ends of a pair apart through their shared prompt; 0 switches it "
            "off, as in the paper. Higher trusts the pair's label more and the token rewards less."
        },
    )
    leaf_beta: float = field(
        default=0.1,
        metadata={"help": "β of the leaf loss, DPO's β: smaller lets the policy move farther before a pair is done."},
    )
    branch_coef: float = field(
        default=0.0,
        metadata={
            "help": "λ_branch, weight of the balance from one end of a pair to the other, asked exactly; 0 switches it "
            "off. For rewards that say how much better one answer is, such as the read-out's."
        },
    )
    length_normalize: bool = field(
        default=True,
        metadata={"help": "Divide a response's balance loss by its length, so that long responses do not dominate."},
    )
    max_tokens_at_once: int = field(
        default=4096,
        metadata={
            "help": "A batch of more tokens, with their padding, is read in parts whose gradients are added up: it "
            "bounds memory where texts are long and changes nothing else. One pair is always read at once. On a CPU, "
            "where attention keeps its scores, a token of a row of c counts as 1 + c/256."
        },
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Keep only the last so many prompt tokens; None keeps all."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "As in transformers."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of linear warm-up, or a share of all below 1."})
    weight_decay: float = field(default=0.0, metadata={"help": "As in transformers."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    logging_steps: float = field(default=5, metadata={"help": "Steps between two log lines."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When held-out pairs are looked at."})
    save_strategy: str = field(
        default="steps", metadata={"help": "What checkpoints are counted by; in rounds, one a round."}
    )
    save_steps: float = field(
        default=0.1, metadata={"help": "Steps from one checkpoint to the next, or a share of all below 1."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    report_to: str | list[str] | None = field(
        default="none", metadata={"help": "tensorboard, wandb, trackio, … as transformers offers them, if installed."}
    )
    ddp_timeout: int = field(
        default=21600,
        metadata={"help": "Seconds that several processes wait for each other: the first one reads alone."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "The collator reads the reward columns itself."}
    )

    def __post_init__(self) -> None:
        """Check what this class adds; raises UserError naming the field, what was expected and what was given."""
        if not 0 < self.eta < math.inf:
            raise UserError(f"eta must be positive and finite, got {self.eta}")
        if not 0 <= self.subtb_lambda <= 1:
            raise UserError(f"subtb_lambda must lie in [0, 1], got {self.subtb_lambda}")
        if self.objective not in OBJECTIVES:
            raise UserError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if not (0 <= self.value_coef < math.inf and 0 <= self.value_margin < math.inf):
            raise UserError(
                f"value_coef and value_margin must not be negative, got {self.value_coef} and {self.value_margin}"
            )
        if not (0 <= self.leaf_coef < math.inf and 0 < self.leaf_beta < math.inf):
            raise UserError(
                f"leaf_coef must not be negative and leaf_beta must be positive, got {self.leaf_coef} and "
                f"{self.leaf_beta}"
            )
        if not 0 <= self.branch_coef < math.inf:
            raise UserError(f"branch_coef must not be negative, got {self.branch_coef}")
        if self.objective == "none" and self.value_coef == self.leaf_coef == self.branch_coef == 0:
            raise UserError("objective 'none' with value_coef, leaf_coef and branch_coef 0 leaves nothing to train")
        if not 0 < self.value_learning_rate < math.inf:
            raise UserError(f"value_learning_rate must be positive, got {self.value_learning_rate}")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise UserError(f"max_prompt_length must be at least 1, got {self.max_prompt_length}")
        if self.max_tokens_at_once < 1:
            raise UserError(f"max_tokens_at_once must be at least 1, got {self.max_tokens_at_once}")
        # transformers finds these out deep inside, or not at all.
        checks = {
            "learning_rate": (0 < self.learning_rate < math.inf, "positive"),
            "num_train_epochs": (0 < self.num_train_epochs < math.inf, "positive"),
            "max_steps": (self.max_steps == -1 or self.max_steps >= 1, "at least 1, or -1 for as many as epochs take"),
            "per_device_train_batch_size": (self.per_device_train_batch_size >= 1, "at least 1"),
            "per_device_eval_batch_size": (self.per_device_eval_batch_size >= 1, "at least 1"),
            "gradient_accumulation_steps": (self.gradient_accumulation_steps >= 1, "at least 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "warmup_steps": (0 <= self.warmup_steps < math.inf, "0 or more"),
            "save_steps": (0 < self.save_steps < math.inf, "positive"),
            "save_total_limit": (self.save_total_limit is None or self.save_total_limit >= 1, "at least 1, or None"),
            "seed": (0 <= self.seed < 2**32, "in [0, 2^32)"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise UserError(f"{name} must be {expected}, got {getattr(self, name)}")
        if self.load_best_model_at_end:
            raise UserError(
                "load_best_model_at_end is not supported: a doctor is what its last step left. Leave it out; every "
                "checkpoint is a doctor's folder, and save_total_limit says how many are kept to choose from"
            )
        if self.save_only_model:
            raise UserError(
                "save_only_model is not supported: without the optimizer's state a run that is cut would go on as "
                "another one. Leave it out; of a LoRA doctor that state is small"
            )
        super().__post_init__()
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Some schedules want settings of their own, which transformers finds out when training begins."""
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        name, given = SchedulerType(self.lr_scheduler_type), self.lr_scheduler_kwargs
        try:
            get_scheduler(name, optimizer, 1, 10, scheduler_specific_kwargs=given)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"lr_scheduler_type {name.value} cannot be used with lr_scheduler_kwargs {given} "
                f"({first_line(error)}): from Python give it what it needs there, or choose another, such as cosine, "
                "linear or constant_with_warmup"
            ) from error

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of warm-up; none where they would be all there are, and nothing would be learned."""
        found = int(super().get_warmup_steps(num_training_steps))
        return found if found < num_training_steps else 0
