"""The folder of a training's checkpoints: whose it is, and where to go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from llmdoctor.errors import FingerprintMismatch
from llmdoctor.files import digest, write_json
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


def claim_checkpoints(folder: Path, config: DoctorConfig | RewardModelConfig, resume: bool) -> Path | None:
    """Make the folder this training's, and find the checkpoint to go on from.

    Args:
        folder: of the checkpoints.
        config: what is to be made: its base, rewards and settings.
        resume: go on with what is there; False throws it away.

    Raises:
        FingerprintMismatch: what is there is another training's.
    """
    current = {
        "base": digest(config.base_fingerprint),
        "rewards": digest(config.rewards_fingerprint),
        "settings": digest(decisive(config.training)),
    }
    marker = folder / "fingerprint.json"
    if not resume and folder.exists():
        # Away as a whole: what a cut leaves half deleted would pass for somebody's.
        retired = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(retired, ignore_errors=True)
        folder.replace(retired)
        shutil.rmtree(retired, ignore_errors=True)
    if _is_json(marker):
        stored = json.loads(marker.read_text(encoding="utf-8"))
        if stored != current:
            raise FingerprintMismatch(
                str(folder), stored, current, "Start anew with resume switched off, or give another output folder."
            )
    write_json(marker, current)
    return last_checkpoint(folder)
