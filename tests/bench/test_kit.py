"""Models of a task: trained once, taken as they are only if they are what would be trained now."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.bench.tools import Told, options_of, tasks_of

from llmdoctor.bench.arena import Arena
from llmdoctor.bench.kit import ABLATIONS, LABELS, MERGED, MERGED_SUBTB, PAIRS, Kit
from llmdoctor.bench.methods import CONTENDERS
from llmdoctor.errors import FingerprintMismatch, UserError
from llmdoctor.models.doctor import DoctorConfig
from llmdoctor.models.loading import load_model
from llmdoctor.rewards.acquire import RewardOptions, acquire_rewards
from llmdoctor.rewards.store import RewardStore
from llmdoctor.tfpo.train import train_doctor

SCORED = ("rewards", "pos_logps", "neg_logps")
TRAINED = ("tfpo", "dpo", "genarm", "reward_model")


@pytest.fixture
def models(compared: Arena, tmp_path: Path) -> Path:
    """A copy of the finished comparison's models."""
    return Path(shutil.copytree(compared.output / "models", tmp_path / "models"))


def kit_of(tiny_folder: Path, sources: Path, models: Path, **changes: Any) -> tuple[Kit, Told]:
    told = Told()
    return Kit(tasks_of(sources)[0], options_of(tiny_folder, sources, **changes), models, told), told


def test_pairs_are_the_same_for_all_and_a_part_is_their_beginning(
    tiny_folder: Path, bench_sources: Path, tmp_path: Path
) -> None:
    every, _ = kit_of(tiny_folder, bench_sources, tmp_path)
    few, _ = kit_of(tiny_folder, bench_sources, tmp_path, pairs=5)
    assert every.pairs() == every.pairs()
    assert few.pairs() == every.pairs()[:5]
    assert len({(pair.chosen, pair.rejected) for pair in every.pairs()}) == 12


def test_shards_that_want_the_token_rewards_at_once_wait_for_each_other(
    tiny_folder: Path, bench_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of three asks while another is making them; the first makes all, the others find them whole."""
    inside, most = [0], [0]
    scored: list[list[list[float]]] = []
    written: set[int] = set()
    asking = threading.Barrier(3)

    def watched(*args: Any, **kwargs: Any) -> RewardStore:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        store = acquire_rewards(*args, **kwargs)
        # Read anew, the log-likelihoods would lie in younger files.
        written.add(max(path.stat().st_mtime_ns for path in (store.folder / "logps").iterdir()))
        scored.append([row["chosen_rewards"] for row in store.rows()])
        inside[0] -= 1
        return store

    monkeypatch.setattr("llmdoctor.rewards.acquire.acquire_rewards", watched)

    def ask() -> None:
        kit, _ = kit_of(tiny_folder, bench_sources, tmp_path)
        asking.wait()
        kit.rewards()

    shards = [threading.Thread(target=ask) for _ in range(3)]
    for shard in shards:
        shard.start()
    for shard in shards:
        shard.join()
    assert most == [1]
    assert len(written) == 1
    assert scored == [scored[0]] * 3
    assert len(scored[0]) == 12


def test_processes_that_want_a_model_at_once_train_it_once(
    tiny_folder: Path, bench_sources: Path, tmp_path: Path
) -> None:
    """Pareto's soups and MOD mix the same policies: whoever comes second waits, and takes what the first has made."""
    asking = threading.Barrier(2)
    told: list[Told] = []
    found: list[Path] = []

    def ask() -> None:
        kit, steps = kit_of(tiny_folder, bench_sources, tmp_path)
        told.append(steps)
        asking.wait()
        found.append(kit.trained("genarm", 0))

    shards = [threading.Thread(target=ask) for _ in range(2)]
    for shard in shards:
        shard.start()
    for shard in shards:
        shard.join()
    assert found == [tmp_path / "a" / "seed0" / "genarm"] * 2
    assert sum("training genarm" in step for steps in told for step in steps.started) == 1
    assert sum("waiting" in line for steps in told for line in steps.said) >= 1


def test_models_of_several_bases_lie_side_by_side(tiny_folder: Path, bench_sources: Path, tmp_path: Path) -> None:
    """The token rewards are the patient's and lie where they were; a base that is the patient has no folder."""
    other = shutil.copytree(tiny_folder, tmp_path / "small")
    for base in ("", str(tiny_folder), str(other)):
        kit, _ = kit_of(tiny_folder, bench_sources, tmp_path / "models", base=base)
        kit.rewards()
        kit.trained("genarm", 0)
    made = sorted(
        str(path.relative_to(tmp_path / "models")) for path in (tmp_path / "models").glob("*/*/*/doctor.json")
    )
    assert made == ["a/seed0/genarm/doctor.json", "a@small/seed0/genarm/doctor.json"]
    assert [path.parent.name for path in (tmp_path / "models").glob("*/rewards")] == ["a"]


@pytest.mark.parametrize("kind", TRAINED)
def test_a_trained_model_is_taken_as_it_is(tiny_folder: Path, bench_sources: Path, models: Path, kind: str) -> None:
    kit, told = kit_of(tiny_folder, bench_sources, models)
    folder = models / "a" / "seed1" / kind
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert kit.trained(kind, 1) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    assert not [step for step in told.started if "training" in step]


@torch.inference_mode()
def test_transfer_q_looks_ahead_with_the_policy_that_dpo_trained(
    tiny_folder: Path, bench_sources: Path, models: Path
) -> None:
    """Not with its base, which the patient and its guides share."""
    kit, _ = kit_of(tiny_folder, bench_sources, models)
    decoder: Any = CONTENDERS["transfer_q"].build(kit, 0, {"strength": 1.0}).decoder  # type: ignore[misc]
    ids = torch.tensor([[5, 9, 200, 7]])
    bare = kit.patient.model(ids).logits
    trained = PeftModel.from_pretrained(kit.fresh_base().model, models / "a" / "seed0" / "dpo" / "adapter")(ids).logits
    assert torch.allclose(decoder.aligned.model(ids).logits, trained, atol=1e-5)
    assert float((trained - bare).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", TRAINED)
def test_a_model_of_other_settings_is_refused(tiny_folder: Path, bench_sources: Path, models: Path, kind: str) -> None:
    kit, _ = kit_of(tiny_folder, bench_sources, models, epochs=2)
    with pytest.raises(FingerprintMismatch, match=r"\((num_train_)?epochs: stored 1(\.0)?, now 2") as caught:
        kit.trained(kind, 0)
    assert str(models / "a" / "seed0" / kind) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_doctor_of_other_rewards_or_another_base_is_refused(
    tiny_folder: Path, bench_sources: Path, models: Path, tmp_path: Path
) -> None:
    """Other weights, whatever their folder is called; and token rewards made anew from other pairs: their fingerprint
    is no longer the one that the doctor names.
    """
    other = shutil.copytree(tiny_folder, tmp_path / "copy")
    model = load_model(str(tiny_folder), dtype="float32").model
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.01
    model.save_pretrained(other)
    shutil.copytree(models / "a", models / "a@copy")
    kit, _ = kit_of(tiny_folder, bench_sources, models, base=str(other))
    with pytest.raises(FingerprintMismatch, match="base: stored"):
        kit.trained("tfpo", 0)
    shutil.rmtree(models / "a" / "rewards")
    kit, _ = kit_of(tiny_folder, bench_sources, models, pairs=10)
    with pytest.raises(FingerprintMismatch, match="rewards: stored"):
        kit.trained("tfpo", 0)


def test_a_doctor_of_another_seed_in_its_place_is_refused(tiny_folder: Path, bench_sources: Path, models: Path) -> None:
    shutil.rmtree(models / "a" / "seed0" / "tfpo")
    shutil.copytree(models / "a" / "seed1" / "tfpo", models / "a" / "seed0" / "tfpo")
    kit, _ = kit_of(tiny_folder, bench_sources, models)
    with pytest.raises(FingerprintMismatch, match="seed: stored 1, now 0"):
        kit.trained("tfpo", 0)


@pytest.mark.parametrize("kind", [kind for kind in ABLATIONS if kind != "tfpo"])
def test_an_ablation_is_trained_without_its_part_and_found_again(
    tiny_folder: Path, bench_sources: Path, models: Path, kind: str
) -> None:
    """Exactly what `ABLATIONS` names differs from the whole doctor: settings of training, or of the rewards."""
    # One of them is a contender, too, and may have been trained as such.
    shutil.rmtree(models / "a" / "seed0" / kind, ignore_errors=True)
    kit, told = kit_of(tiny_folder, bench_sources, models)
    made = DoctorConfig.load(kit.trained(kind, 0))
    whole = DoctorConfig.load(models / "a" / "seed0" / "tfpo")
    changes = ABLATIONS[kind]
    assert {k: v for k, v in made.training.items() if v != whole.training[k]} == {
        k: v for k, v in {**changes.get("config", {}), **changes.get("rounds", {})}.items() if v != whole.training[k]
    }
    assert (made.rewards_fingerprint != whole.rewards_fingerprint) == ("rewards" in changes)
    assert f"a, seed 0: training {kind}" in told.started
    cost = models / "a" / "seed0" / f"{kind}.json"
    assert json.loads(cost.read_text())["seconds"] > 0
    cost.unlink()
    again, told = kit_of(tiny_folder, bench_sources, models)
    assert again.trained(kind, 0) == models / "a" / "seed0" / kind
    assert not [step for step in told.started if "training" in step]
    assert not cost.exists()


def test_no_sparsity_keeps_every_token(tiny_folder: Path, bench_sources: Path, models: Path) -> None:
    """But those that the signed variant takes away: a chosen token that the negative face likes better."""
    kit, _ = kit_of(tiny_folder, bench_sources, models)
    kept = {theta: kit.rewards(**options).dataset() for theta, options in ((0.5, {}), (0.0, {"theta": 0.0}))}
    zeros = {theta: sum(r == 0 for row in rows for r in row["chosen_rewards"]) for theta, rows in kept.items()}
    assert zeros[0.0] < zeros[0.5]
    for row in kept[0.0]:
        for reward, pos, neg in zip(*(row[f"chosen_{name}"] for name in SCORED), strict=True):
            assert (reward != 0) == (pos > neg or not RewardOptions().signed)


def test_doctors_of_two_seeds_differ(compared: Arena) -> None:
    weights = [
        (compared.output / f"models/a/seed{seed}/tfpo/adapter/adapter_model.safetensors").read_bytes()
        for seed in (0, 1)
    ]
    assert weights[0] != weights[1]


def test_the_doctor_is_what_train_doctor_makes(
    compared: Arena, tiny_folder: Path, bench_sources: Path, tmp_path: Path
) -> None:
    """The same pairs, epochs and seed give the same bytes; here its parts are kept for rows of their own."""
    from llmdoctor.tfpo.config import TFPOConfig
    from llmdoctor.tfpo.rounds import RoundOptions

    kit = compared.kits["a"]
    config = TFPOConfig(
        output_dir=str(tmp_path / "own"), seed=1, num_train_epochs=1, disable_tqdm=True, eval_strategy="no"
    )
    rounds = RoundOptions(rounds=kit.options.rounds)
    own = train_doctor(load_model(str(tiny_folder)), kit.rewards(), config, rounds=rounds, dimension="positive")
    name = "adapter/adapter_model.safetensors"
    models = compared.output / "models/a/seed1"
    for part, kind in (("rounds", "tfpo"), ("pairs", LABELS)):
        assert (own / "checkpoints" / "parts" / part / name).read_bytes() == (models / kind / name).read_bytes()
    merged, expected = load_file(own / name), load_file(kit.trained(MERGED, 1) / name)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in merged.items())


def test_other_merged_doctors_are_of_other_parts(compared: Arena) -> None:
    kit = compared.kits["a"]
    stored = DoctorConfig.load(kit.trained(MERGED_SUBTB, 1)).training["merged"]
    assert [(part["weight"], part["training"]["objective"]) for part in stored] == [(1.0, "subtb"), (1.0, "subtb")]
    assert [part["training"]["rounds"] for part in stored] == [compared.options.rounds, 0]
    assert kit.recipe(MERGED_SUBTB, 1) != kit.recipe(MERGED, 1)


def test_without_rounds_there_is_nothing_to_merge(compared: Arena) -> None:
    options = replace(compared.options, rounds=0)
    kit = Kit(compared.tasks[0], options, compared.output / "models-of-pairs", Told())
    assert kit.trained(MERGED, 0) == kit.trained(PAIRS, 0)
    assert kit.recipe(MERGED, 0) == kit.recipe(PAIRS, 0)


@pytest.mark.parametrize(("kind", "method"), [("dpo", "DPO"), ("reward_model", "A reward model")])
def test_without_trl_it_says_what_to_install(
    tiny_folder: Path, bench_sources: Path, models: Path, monkeypatch: pytest.MonkeyPatch, kind: str, method: str
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    kit, _ = kit_of(tiny_folder, bench_sources, models)
    with pytest.raises(
        UserError, match=rf"{method} is trained by TRL.*: pip install -e '\.\[bench\]' in llmdoctor's folder$"
    ):
        kit.trained(kind, 5)


def test_what_good_answers_score(compared: Arena) -> None:
    """CARDS's threshold: the mean reward of the chosen responses, one by one, each to its end of turn."""
    kit = compared.kits["a"]
    model = kit.reward_model(0)
    singles = [model.score([pair.prompt], [pair.chosen], complete=[pair.chosen_complete])[0] for pair in kit.pairs()]
    assert kit.good_reward(0) == pytest.approx(sum(singles) / len(singles), abs=1e-4)
