"""The folder of a training's checkpoints: whose it is, and where to go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmdoctor.errors import FingerprintMismatch
from llmdoctor.files import digest, discard, write_json
from llmdoctor.models.doctor import DoctorConfig
from llmdoctor.models.reward_model import RewardModelConfig
from llmdoctor.tfpo.options import decisive


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; the trainer writes its state file last, so one without it was cut."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and int(number) > 0 and _is_json(path / "trainer_state.json"):
            whole.append((int(number), path))
    return max(whole)[1] if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


def training_identity(config: DoctorConfig | RewardModelConfig) -> dict[str, Any]:
    """What makes a training this one: fingerprints of its base, rewards and settings, and what is behind them."""
    settings = decisive(config.training)
    return {
        "base": digest(config.base_fingerprint),
        "rewards": digest(config.rewards_fingerprint),
        "settings": digest(settings),
        "training": json.loads(json.dumps(settings)),
        "base_fingerprint": dict(config.base_fingerprint),
    }


REMEDY = "Give the settings it began with, start anew (--restart, or resume=False), or give another output folder."


def check_same_training(
    what: Path, stored: Mapping[str, Any], current: Mapping[str, Any], remedy: str = REMEDY
) -> None:
    """Refuse what another training made, naming each setting that differs where both sides say what theirs are.

    Args:
        what: the folder in question.
        stored, current: `training_identity` of what is there and of what is asked for.
        remedy: what the user may do.

    Raises:
        FingerprintMismatch: they are not the same.
    """
    was, now = ({name: side.get(name) for name in ("base", "rewards", "settings")} for side in (stored, current))
    if was == now:
        return
    before, after = ({name: str(value) for name, value in side.items()} for side in (was, now))
    # Those of an older version have fewer of them.
    behind = {"settings": "training", "base": "base_fingerprint"}
    told = [{name: side[its] for name, its in behind.items() if its in side} for side in (stored, current)]
    raise FingerprintMismatch(str(what), before, after, remedy, told[0], told[1])


def claim_checkpoints(folder: Path, config: DoctorConfig | RewardModelConfig, resume: bool) -> Path | None:
    """Make the folder this training's, and find the checkpoint to go on from.

    Args:
        folder: of the checkpoints.
        config: what is to be made: its base, rewards and settings.
        resume: go on with what is there; False throws it away.

    Raises:
        FingerprintMismatch: what is there is another training's.
    """
    current = training_identity(config)
    marker = folder / "fingerprint.json"
    if not resume:
        discard(folder)
    # Where nothing was trained yet, nothing is lost: settings that ended a run at once may be mended.
    begun = folder.is_dir() and any(path != marker for path in folder.iterdir())
    if begun and _is_json(marker):
        check_same_training(folder, json.loads(marker.read_text(encoding="utf-8")), current)
    write_json(marker, current)
    return last_checkpoint(folder)
