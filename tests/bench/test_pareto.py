"""Two tasks at once: mixtures, fronts and hypervolumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from tests.bench.tools import PROMPTS, Told, arena_of, cell_files, tasks_of

from llmdoctor.baselines.merging import reward_soup
from llmdoctor.bench.arena import Arena
from llmdoctor.bench.methods import CONTENDERS, PATIENT, Contender
from llmdoctor.bench.options import Task
from llmdoctor.bench.pareto import FIRST_SHARES, STRENGTHS, Pareto, ParetoPoint, _Scored, _told, _volumes, make_pareto
from llmdoctor.decoding.engine import GuidedDecoder
from llmdoctor.decoding.guides import Guide, load_guide
from llmdoctor.decoding.request import Request, SamplingParams
from llmdoctor.errors import FingerprintMismatch, UserError
from llmdoctor.models.merging import merge_doctors

ONE = dict.fromkeys(STRENGTHS, (1.0,))


@pytest.fixture(scope="module")
def made(
    tiny_folder: Path, bench_sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Arena, Told, Pareto]:
    output = tmp_path_factory.mktemp("pareto")
    arena, told = arena_of(tiny_folder, bench_sources, output, tasks=tasks_of(bench_sources), seeds=1)
    return arena, told, make_pareto(arena, ONE)


def test_points_of_every_method_and_mixture(made: tuple[Arena, Told, Pareto]) -> None:
    arena, _, result = made
    assert set(result) == set(get_type_hints(Pareto))
    assert result == json.loads((arena.output / "pareto.json").read_text())
    assert (result["tasks"], result["prompts"], result["seeds"]) == (["a", "b"], PROMPTS, 1)
    assert [(point["method"], point["setting"]) for point in result["points"]] == [
        (method, {"share": share, "strength": 1.0}) for method in STRENGTHS for share in FIRST_SHARES
    ]
    assert all(set(point) == set(get_type_hints(ParetoPoint)) for point in result["points"])
    assert set(result["hypervolume"]) == set(STRENGTHS)
    for method, volume in result["hypervolume"].items():
        assert volume["kl"] == max(point["kl"] for point in result["points"] if point["method"] == method)
        assert 0 <= volume["low"] <= volume["high"]
        assert volume["value"] >= 0
        ours = result["hypervolume"]["llmdoctor_merged"]["value"]
        assert volume["lead"] == pytest.approx(ours - volume["value"])
        assert volume["lead_low"] <= volume["lead_high"]
    # With one strength a method's points of it are all that it has.
    assert [(one["method"], one["strength"]) for one in result["by_strength"]] == [
        (method, 1.0) for method in STRENGTHS
    ]
    for one in result["by_strength"]:
        rest = {name: value for name, value in one.items() if name not in ("method", "strength")}
        assert rest == result["hypervolume"][one["method"]]


def test_the_reference_is_the_patient(made: tuple[Arena, Told, Pareto]) -> None:
    arena, _, result = made
    own = [answer.text for answer in arena.cells.get(arena.tasks[0], CONTENDERS[PATIENT], {}, 0).sample(0)]
    prompts = [prompt.messages for prompt in arena.prompts]
    for place, task in enumerate(arena.tasks):
        scores = arena.judge(task).scores(prompts, own, own)
        assert result["reference"][place] == pytest.approx(sum(scores) / len(scores))


def test_a_point_is_on_the_front_unless_its_method_has_a_better_one(made: tuple[Arena, Told, Pareto]) -> None:
    points = made[2]["points"]
    for place, point in enumerate(points):
        own = [(index, other["scores"]) for index, other in enumerate(points) if other["method"] == point["method"]]
        beaten = any(
            all(one >= mine for one, mine in zip(scores, point["scores"], strict=True))
            # Of equal points the first stands for all.
            and (scores != point["scores"] or index < place)
            for index, scores in own
        )
        assert point["on_front"] == (not beaten)


@pytest.mark.parametrize("method", ["llmdoctor_merged", "llmdoctor"])
def test_strengths_that_spend_no_more(method: str) -> None:
    """What is told of them is what is committed: LLMdoctor's mixtures of a strength spend no more than soups do."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "pareto.json"
    points = json.loads(path.read_text(encoding="utf-8"))["points"]
    for ours, theirs in zip(STRENGTHS[method], STRENGTHS["reward_soup"], strict=True):
        spent = {
            name: [point["kl"] for point in points if (point["method"], point["setting"]["strength"]) == key]
            for name, key in (("ours", (method, ours)), ("soups", ("reward_soup", theirs)))
        }
        assert len(spent["ours"]) == len(spent["soups"]) == len(FIRST_SHARES)
        assert np.mean(spent["ours"]) <= np.mean(spent["soups"])


def point(*scores: float, kl: float = 1.0) -> _Scored:
    """The same on five prompts."""
    return _Scored("any", {}, np.broadcast_to(scores, (5, 1, 2)), kl, 1.0)


def test_a_volume_by_hand() -> None:
    """Reference (0, 0); points (2, 1) and (1, 2), on every prompt alike: 2 · 1 + 1 · 2 − 1 · 1 = 3, without spread."""
    patient = point(0.0, 0.0)
    both = [point(2.0, 1.0, kl=3.0), point(1.0, 2.0, kl=7.0)]
    assert set(_volumes(both, patient)) == {3.0}
    # What is worse than the patient on one count dominates nothing.
    assert set(_volumes([point(5.0, -1.0)], patient)) == {0.0}
    told = _told(both, _volumes(both, patient), _volumes([point(2.0, 2.0)], patient))
    assert told == {"value": 3, "low": 3, "high": 3, "kl": 7, "lead": 1, "lead_low": 1, "lead_high": 1}


def test_a_lead_is_of_the_same_prompts() -> None:
    """Volumes that swing together with the prompts: the lead of one that is always larger by a half is certain."""
    spread = np.random.default_rng(1).uniform(1, 3, (200, 1, 1)) * np.ones(2)
    patient = _Scored("patient", {}, np.zeros((200, 1, 2)), 0.0, 1.0)
    ours, theirs = (_Scored("any", {}, spread * factor, 1.0, 1.0) for factor in (1.5**0.5, 1.0))
    told = _told([theirs], _volumes([theirs], patient), _volumes([ours], patient))
    assert told["low"] < told["value"] < told["high"]
    assert told["lead"] == pytest.approx(0.5 * told["value"])
    assert (told["lead_low"], told["lead_high"]) == pytest.approx((0.5 * told["low"], 0.5 * told["high"]))


@pytest.mark.parametrize(("method", "kind"), [("llmdoctor", "merged"), ("mod", "dpo")])
def test_mixtures_are_two_guides_by_hand(made: tuple[Arena, Told, Pareto], method: str, kind: str) -> None:
    """share 0.25 of strength 1: β = 0.25 on the first task's guide and 0.75 on the second's."""
    arena, _, _ = made
    kits = [arena.kits["a"], arena.kits["b"]]
    guides = [load_guide(kit.trained(kind, 0), kits[0].patient, name=kit.task.name, form="ratio") for kit in kits]
    assert texts(arena, guides, {"a": 0.25, "b": 0.75}) == kept(arena, method, kind)


def test_doctors_are_merged_by_hand(made: tuple[Arena, Told, Pareto], tmp_path: Path) -> None:
    """A quarter of the one's weight differences and three of the other's, as one guide at β = 1."""
    arena, _, _ = made
    kits = [arena.kits["a"], arena.kits["b"]]
    folder = merge_doctors([kit.trained("merged", 0) for kit in kits], (0.25, 0.75), tmp_path / "merged")
    guide = load_guide(folder, kits[0].patient, name="one")
    assert texts(arena, [guide], {"one": 1.0}) == kept(arena, "llmdoctor_merged", "merged")


def test_a_soup_is_a_merged_policy_by_hand(made: tuple[Arena, Told, Pareto]) -> None:
    arena, _, _ = made
    kits = [arena.kits["a"], arena.kits["b"]]
    paths = [kit.trained("dpo", 0) for kit in kits]
    merged = reward_soup(paths, [0.25, 0.75], kits[0].fresh_base())
    guide = Guide("soup", merged, load_guide(paths[0], kits[0].patient).reference)
    assert texts(arena, [guide], {"soup": 1.0}) == kept(arena, "reward_soup", "dpo")


def texts(arena: Arena, guides: list[Guide], betas: dict[str, float]) -> list[str]:
    requests = [
        Request(prompt.messages, betas=betas, sampling=SamplingParams(max_new_tokens=6, seed=place << 16))
        for place, prompt in enumerate(arena.prompts)
    ]
    return [done.text for done in GuidedDecoder(arena.kits["a"].patient, guides).generate(requests)]


def kept(arena: Arena, method: str, kind: str) -> list[str]:
    """The answers on disk."""

    def never(*_: Any) -> Any:
        raise AssertionError("the cell is there")

    names, sources, faces, judges = zip(*((t.name, t.pairs, t.faces, t.judge) for t in arena.tasks), strict=True)
    pair = Task("+".join(names), "+".join(sources), "+".join(faces), "+".join(judges))
    contender = Contender(method, "", "", (), never, trained=(kind,))
    cell = arena.cells.get(pair, contender, {"share": 0.25, "strength": 1.0}, 0)
    return [answer.text for answer in cell.answers]


def test_a_second_run_finds_all(made: tuple[Arena, Told, Pareto], tiny_folder: Path, bench_sources: Path) -> None:
    before = cell_files(made[0].output)
    arena, told = arena_of(tiny_folder, bench_sources, made[0].output, tasks=tasks_of(bench_sources), seeds=1)
    assert make_pareto(arena, ONE) == made[2]
    assert told.started == []
    assert cell_files(made[0].output) == before


def test_other_pairs_of_either_task_are_refused(
    made: tuple[Arena, Told, Pareto], tiny_folder: Path, bench_sources: Path
) -> None:
    one, two = tasks_of(bench_sources)
    swapped = Task(two.name, one.pairs, two.faces, two.judge)
    arena, _ = arena_of(tiny_folder, bench_sources, made[0].output, tasks=[one, swapped], seeds=1)
    with pytest.raises(FingerprintMismatch, match="learned: stored"):
        make_pareto(arena, ONE)


def test_two_tasks_are_needed(tiny_folder: Path, bench_sources: Path, tmp_path: Path) -> None:
    arena, _ = arena_of(tiny_folder, bench_sources, tmp_path / "out")
    with pytest.raises(UserError, match="a Pareto front needs two tasks, this comparison has 1"):
        make_pareto(arena)
