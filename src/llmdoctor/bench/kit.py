"""What the methods of one task are built from: trained once, kept on disk, loaded when first asked for."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from filelock import FileLock, Timeout

from llmdoctor.bench.options import BenchOptions, Task
from llmdoctor.bench.record import pairs_record
from llmdoctor.data.preferences import PreferencePair, load_preferences
from llmdoctor.decoding.guides import Guide, load_guide
from llmdoctor.files import digest, write_json
from llmdoctor.models.loading import LoadedModel, load_model, stored_weights_fingerprint
from llmdoctor.rewards.store import RewardStore

if TYPE_CHECKING:
    from llmdoctor.baselines.training import BaselineOptions
    from llmdoctor.rewards.readout import Readout
    from llmdoctor.tfpo.config import TFPOConfig
    from llmdoctor.tfpo.rounds import RoundOptions

HELD_OUT = 0.1
"""Share of the pairs that nothing is trained on."""

ROUND_BATCH = 160
"""Answers of a round drawn together; the one number that the committed answers' recipes name."""

MERGED = "merged"
"""LLMdoctor as it is, `train_doctor`'s default: the mean of the doctors of the rounds and of the pairs' labels."""

MERGED_SUBTB = "merged_subtb"
"""The sum of the doctors of the rounds and of the pairs, the latter with its balance of token rewards."""

PAIRS, LABELS = "no_rounds", "pairs_no_subtb"
"""The doctors of the pairs: of their token rewards and labels, what `train_doctor` makes without rounds; of their
labels alone."""

_MERGED: Mapping[str, Mapping[str, float]] = {
    MERGED: {"tfpo": 0.5, LABELS: 0.5},
    MERGED_SUBTB: {"tfpo": 1.0, PAIRS: 1.0},
}
"""What merged doctors are of, and how much of each."""

_PAIRS: Mapping[str, Any] = {"rounds": {"rounds": 0}}

ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "tfpo": {},
    "no_subtb": {"config": {"objective": "none"}},
    "no_branch": {"rounds": {"round_branch_coef": 0.0}},
    "no_flow": {"config": {"objective": "squared_error"}, "rounds": {"round_branch_coef": 0.0}},
    "online_dpo": {"config": {"objective": "none"}, "rounds": {"round_branch_coef": 0.0, "round_leaf_coef": 30.0}},
    PAIRS: _PAIRS,
    LABELS: {**_PAIRS, "config": {"objective": "none"}},
    "pairs_no_value": {**_PAIRS, "config": {"value_coef": 0.0}},
    "pairs_no_leaf": {**_PAIRS, "config": {"leaf_coef": 0.0}},
    "pairs_no_flow": {**_PAIRS, "config": {"objective": "squared_error"}},
    "pairs_no_sparsity": {**_PAIRS, "rewards": {"theta": 0.0}},
    "pairs_no_anchor": {
        **_PAIRS,
        "config": {"reference_anchor": False, "terminal_anchor": False, "leaf_coef": 0.0},
        "rewards": {"signed": False},
    },
}
"""Doctors by themselves, and what can be taken from them: `tfpo` is trained in rounds, `no_rounds` on the pairs and
their token rewards. `online_dpo` is DPO in rounds on answers of its own, ranked by the same read-out.
The last is the paper's objective as it is written."""


READOUT = "readout"
"""What `Kit.recipe` calls the patient's read-out."""


class Steps(Protocol):
    """What a comparison tells the outside world; the command line draws bars from it."""

    def start(self, description: str, total: int | None = None, unit: str = "") -> None:
        """A step of `total` units begins."""

    def advance(self, units: int = 1) -> None:
        """Units were finished."""

    def done(self) -> None:
        """The step is over."""

    def say(self, text: str) -> None:
        """A line of text."""

    def training_callback(self, description: str) -> Any:
        """A `TrainerCallback` that reports a training as one step."""


@contextmanager
def only_one(lock: Path, made: Path, steps: Steps) -> Iterator[None]:
    """Hold a lock file while `made` is made; where another process makes it, say so and wait for that one to end."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(blocking=False)
    except Timeout:
        steps.say(f"waiting for another process that makes {made}")
        held.acquire()
    try:
        yield
    finally:
        held.release()


class Kit:
    """Pairs, token rewards, doctors, baselines and reward models of one task.

    Args:
        task: what is learned.
        options: how large.
        folder: where trained models are kept.
        steps: told of progress.
    """

    def __init__(self, task: Task, options: BenchOptions, folder: Path, steps: Steps) -> None:
        self.task = task
        self.options = options
        # Token rewards are the patient's, whatever is trained on them.
        self._rewards_folder = folder / task.name
        self._models_folder = folder / options.folder(task.name)
        self.steps = steps
        self._loaded: dict[tuple[Any, ...], Any] = {}

    @property
    def patient(self) -> LoadedModel:
        """The frozen model, one for all kits."""
        return _patient(self.options.patient)

    def fresh_base(self) -> LoadedModel:
        """The base of doctors and baselines, loaded anew because training changes it."""
        return load_model(self.options.base or self.options.patient)

    def pairs(self) -> list[PreferencePair]:
        """The pairs: drawn once from the source, the same for every seed and method; the last tenth is held out."""
        found = list(load_preferences(self.task.pairs))
        random.Random(0).shuffle(found)
        return found[: self.options.pairs]

    def training_pairs(self) -> list[PreferencePair]:
        """Those that everything is trained on."""
        pairs = self.pairs()
        return pairs[: len(pairs) - round(len(pairs) * HELD_OUT)]

    @property
    def weights(self) -> dict[str, str]:
        """Fingerprints of the patient's and the base's weights, which a name alone does not hold."""
        specs = {"patient": self.options.patient, "base": self.options.base or self.options.patient}
        return {role: _weights(spec) for role, spec in specs.items()}

    @property
    def lesson(self) -> str:
        """Fingerprint of what is learned: the pairs and faces themselves, of which the task has the names."""
        from llmdoctor.rewards.faces import face_pairs

        return self._once(
            ("lesson",),
            lambda: digest([pairs_record("", self.pairs())["hash"], asdict(face_pairs(self.task.faces)[0])]),
        )

    def rewards(self, **options: Any) -> RewardStore:
        """Stage 1's token rewards of the pairs; `options` are `RewardOptions`'."""
        from llmdoctor.rewards.acquire import RewardOptions, acquire_rewards
        from llmdoctor.rewards.faces import face_pairs

        name = "-".join(["rewards", *(f"{key}={value}" for key, value in sorted(options.items()))])

        def acquire() -> RewardStore:
            pairs = self.pairs()
            faces = face_pairs(self.task.faces)[0]
            # All seeds share them, and another shard may need them at the same moment.
            folder = self._rewards_folder / name
            with only_one(self._rewards_folder / f".{name}.lock", folder, self.steps):
                self.steps.start(f"{self.task.name}: token rewards", len(pairs), "pairs")
                store = acquire_rewards(
                    self.patient, pairs, folder, faces=faces, rewards=RewardOptions(**options),
                    progress=self.steps.advance,
                )  # fmt: skip
                self.steps.done()
            return store

        return self._once(("rewards", name), acquire)

    def trained(self, kind: str, seed: int) -> Path:
        """The folder of a trained model: an entry of `ABLATIONS`, a merged one, "dpo", "genarm" or "reward_model".

        What its training took, where it was not begun before, is written beside it.
        """

        # As `train_doctor`: without rounds there is nothing to merge.
        kind = PAIRS if kind in _MERGED and not self.options.rounds else kind

        def train() -> Path:
            folder = self._models_folder / f"seed{seed}" / kind
            with only_one(folder.parent / f".{kind}.lock", folder, self.steps):
                start, there = time.perf_counter(), folder.is_dir()
                made = self._train(kind, seed, folder)
                # Of what was begun before, nobody knows how long it took.
                if not there:
                    seconds = time.perf_counter() - start
                    write_json(folder.with_suffix(".json"), {"seconds": seconds, "threads": torch.get_num_threads()})
                return made

        return self._once(("trained", kind, seed), train)

    def guide(self, kind: str, seed: int, form: str) -> Guide:
        """A trained doctor, or DPO or GenARM, as a guide of the patient."""

        def load() -> Guide:
            return load_guide(self.trained(kind, seed), self.patient, name=kind, form=form)

        return self._once(("guide", kind, seed, form), load)

    def policy(self, kind: str, seed: int) -> LoadedModel:
        """A trained model on its own, its adapter merged into a copy of its base."""
        from llmdoctor.models.doctor import Doctor

        def load() -> LoadedModel:
            return Doctor.from_pretrained(self.trained(kind, seed), base=self.fresh_base()).merged()

        return self._once(("policy", kind, seed), load)

    def reward_model(self, seed: int) -> Any:
        """The trained reward model."""
        from llmdoctor.models.reward_model import load_reward_model

        return self._once(("reward_model", seed), lambda: load_reward_model(self.trained("reward_model", seed)))

    def readout(self) -> Readout:
        """The patient's read-out of the training pairs, the same for every seed."""
        from llmdoctor.rewards.readout import fit_readout

        def fit() -> Readout:
            pairs = self.training_pairs()
            self.steps.start(f"{self.task.name}: read-out", len(pairs), "pairs")
            found = fit_readout(self.patient, pairs, progress=self.steps.advance)
            self.steps.done()
            return found

        return self._once(("readout",), fit)

    def good_reward(self, seed: int) -> float:
        """Mean reward of the preferred responses of all pairs, held-out ones too: what an answer should reach."""

        def measure() -> float:
            pairs = self.pairs()
            model = self.reward_model(seed)
            rewards = model.score(
                [pair.prompt for pair in pairs],
                [pair.chosen for pair in pairs],
                complete=[pair.chosen_complete for pair in pairs],
            )
            return float(sum(rewards) / len(rewards))

        return self._once(("good_reward", seed), measure)

    def recipe(self, kind: str, seed: int) -> str:
        """Fingerprint of how a trained model is made: other defaults make other answers."""
        if kind in ABLATIONS:
            from llmdoctor.rewards.acquire import RewardOptions

            changes = ABLATIONS[kind]
            from llmdoctor.rewards import readout

            judge = [readout.SCHEMA_VERSION, list(readout.DEPTHS), list(readout.RIDGES)]
            settings = self._doctor_settings(kind, seed)
            return digest(
                [settings, asdict(RewardOptions(**changes.get("rewards", {}))), judge if settings["rounds"] else None]
            )
        if kind in _MERGED and not self.options.rounds:
            return self.recipe(PAIRS, seed)
        if kind in _MERGED:
            parts = _MERGED[kind]
            return digest([*(self.recipe(part, seed) for part in parts), *parts.values()])
        if kind == READOUT:
            from llmdoctor.rewards import readout

            return digest([readout.SCHEMA_VERSION, list(readout.DEPTHS), list(readout.RIDGES)])
        return digest(asdict(self._budget(seed)))

    def forget(self) -> None:
        """Let go of the models loaded so far; what is on disk stays."""
        self._loaded.clear()

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._loaded:
            self._loaded[key] = make()
        return self._loaded[key]

    def _train(self, kind: str, seed: int, folder: Path) -> Path:
        name = f"{self.task.name}, seed {seed}: training {kind}"
        if kind in ABLATIONS:
            return self._train_doctor(kind, seed, folder, name)
        if kind in _MERGED:
            from llmdoctor.models.merging import is_merged_from, merge_doctors

            parts, weights = [self.trained(part, seed) for part in _MERGED[kind]], list(_MERGED[kind].values())
            return folder if is_merged_from(folder, parts, weights) else merge_doctors(parts, weights, folder)
        from llmdoctor.baselines.dpo import train_dpo
        from llmdoctor.baselines.genarm import train_genarm
        from llmdoctor.baselines.reward_training import train_reward_model

        train: Callable[..., Path] = {
            "dpo": train_dpo, "genarm": train_genarm, "reward_model": train_reward_model,
        }[kind]  # fmt: skip
        callbacks = [self.steps.training_callback(name)]
        return train(self.fresh_base(), self.rewards(), folder, self._budget(seed), callbacks=callbacks)

    def _budget(self, seed: int) -> BaselineOptions:
        from llmdoctor.baselines.training import BaselineOptions

        return BaselineOptions(epochs=self.options.epochs, seed=seed, eval_fraction=HELD_OUT)

    def _train_doctor(self, kind: str, seed: int, folder: Path, name: str) -> Path:
        from llmdoctor.models.doctor import CONFIG_NAME
        from llmdoctor.tfpo.train import train_doctor

        config = self._doctor_config(kind, seed, folder)
        rewards = self.rewards(**ABLATIONS[kind].get("rewards", {}))
        if (folder / CONFIG_NAME).is_file():
            self._check_doctor(folder, self._doctor_settings(kind, seed), rewards)
            return folder
        return train_doctor(
            self.fresh_base(), rewards, config, rounds=self._rounds(kind), patient=self.patient,
            dimension=self.task.faces, callbacks=[self.steps.training_callback(name)], told=self._told,
        )  # fmt: skip

    def _told(self, what: str, units: int) -> None:
        if what:
            self.steps.start(f"{self.task.name}: {what}", units)
        else:
            self.steps.advance(units)

    def _rounds(self, kind: str) -> RoundOptions:
        from llmdoctor.tfpo.rounds import RoundOptions

        changes = {"rounds": self.options.rounds, **ABLATIONS[kind].get("rounds", {})}
        # Not the options': it is written into the doctors and recipes that answers go by, and decides nothing.
        return RoundOptions(**changes, pairs_weight=0.0, round_batch_size=ROUND_BATCH)

    def _doctor_config(self, kind: str, seed: int, folder: Path) -> TFPOConfig:
        from llmdoctor.tfpo.config import TFPOConfig

        return TFPOConfig(
            output_dir=str(folder), seed=seed, disable_tqdm=True,
            num_train_epochs=self.options.epochs,
            eval_strategy="no", **ABLATIONS[kind].get("config", {}),
        )  # fmt: skip

    def _doctor_settings(self, kind: str, seed: int) -> dict[str, Any]:
        """What `train_doctor` writes into `doctor.json` of how it was trained."""
        from llmdoctor.tfpo.options import DoctorOptions, training_record

        return training_record(self._doctor_config(kind, seed, Path()), DoctorOptions(), self._rounds(kind))

    def _check_doctor(self, folder: Path, settings: dict[str, Any], rewards: RewardStore) -> None:
        """FingerprintMismatch unless the doctor in `folder` is what `train_doctor` would make."""
        from llmdoctor.models.doctor import DoctorConfig
        from llmdoctor.tfpo.checkpoints import check_same_training
        from llmdoctor.tfpo.options import decisive

        def identity(base: str, fingerprint: Mapping[str, Any], training: dict[str, Any]) -> dict[str, Any]:
            training = decisive(training)
            return {"base": base, "rewards": digest(fingerprint), "settings": digest(training), "training": training}

        stored = DoctorConfig.load(folder)
        was = identity(str(stored.base_fingerprint.get("model")), stored.rewards_fingerprint, stored.training)
        now = identity(self.weights["base"], dict(rewards.fingerprint), settings)
        check_same_training(folder, was, now, "Give another output folder, or delete it.")


@cache
def _weights(spec: str) -> str:
    return stored_weights_fingerprint(spec)


@cache
def _patient(spec: str) -> LoadedModel:
    return load_model(spec)
