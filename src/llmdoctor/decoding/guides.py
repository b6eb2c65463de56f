"""Who guides: doctors ready to decode beside a patient."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.errors import UserError
from llmdoctor.models.doctor import Doctor, DoctorConfig, local_folder
from llmdoctor.models.loading import LoadedModel, load_model
from llmdoctor.models.logps import LogitsHead
from llmdoctor.models.vocab import Translation, Vocabulary, same_vocabulary

FORMS = ("ratio", "product")

_logger = logging.getLogger(__name__)


@dataclass
class Guide:
    """One model whose log-probabilities, times β, are added to the patient's.

    Attributes:
        name: by which requests give it a β.
        model: the guiding LM, adapters merged.
        reference: subtracted from it (the ratio form): a model, the string "patient" where the doctor's base is the
            patient itself (then it costs no forward pass), or None for the product form.
        system: a system prompt that the guide alone sees.
    """

    name: str
    model: LoadedModel
    reference: LoadedModel | Literal["patient"] | None = None
    system: str | None = None


def load_guide(
    path: str | Path,
    patient: LoadedModel,
    *,
    name: str | None = None,
    form: str = "ratio",
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Guide:
    """A doctor's folder (or hub id) as a guide for `patient`.

    Where its vocabulary is not the patient's it will be translated (`models.vocab`); a warning is logged where it was
    trained on the rewards of a patient with yet another tokenizer than this one.

    Args:
        path: written by `llmdoctor train` or `Doctor.save_pretrained`.
        patient: the model it will guide.
        name: for requests; the doctor's dimension, else the folder's name, if None.
        form: "ratio" adds β (log π_doctor − log π_ref), "product" adds β log π_doctor.

    Raises:
        UserError: no doctor there.
    """
    if form not in FORMS:
        raise UserError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    folder = local_folder(path)
    config = DoctorConfig.load(folder)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    on_patient = all(config.base_fingerprint.get(key) == patient.fingerprint.get(key) for key in ("model", "tokenizer"))
    # The same weights under another name will do: the recorded base may be a folder of another machine.
    spec = patient.spec if on_patient else config.base
    base = load_model(spec, **options) if config.lora else None
    doctor = Doctor.from_pretrained(folder, base=base, **options)
    learnt_from = config.rewards_fingerprint.get("tokenizer")
    if learnt_from and not _shares(patient, learnt_from):
        _logger.warning(
            "the doctor %s was trained on the rewards of a patient with another tokenizer (%s) than %s has (%s)",
            *(path, learnt_from, patient.spec, patient.fingerprint.get("tokenizer")),
        )
    reference: LoadedModel | Literal["patient"] | None = None
    if form == "ratio":
        reference = "patient" if on_patient else load_model(spec, **options)
    return Guide(name or config.dimension or Path(path).name, doctor.merged(), reference)


@dataclass
class Tally:
    """What translating a lane's model has left out so far.

    Attributes:
        positions: distributions that were translated.
        unmapped: sum over them of the probability of tokens that stand for none of the patient's.
        first_pieces: tokens drawn that were scored by their first piece alone.
    """

    positions: int = 0
    unmapped: float = 0.0
    first_pieces: int = 0

    @property
    def unmapped_mass(self) -> float:
        """Mean probability a position; 0 where there was none."""
        return self.unmapped / self.positions if self.positions else 0.0

    @property
    def first_piece_share(self) -> float:
        """Share of the drawn tokens that were scored by their first piece."""
        return self.first_pieces / self.positions if self.positions else 0.0


@dataclass
class LaneSpec:
    """One model that runs at every position, and how it reads a conversation.

    Attributes:
        translation: into the patient's vocabulary; None where the model shares it.
        tally: of what the translation leaves out.
    """

    model: Any
    encoder: ChatEncoder
    head: LogitsHead
    system: str | None = None
    translation: Translation | None = None
    tally: Tally = field(default_factory=Tally)


def lanes_of(patient: LoadedModel, guides: list[Guide]) -> tuple[list[LaneSpec], list[int], list[int | None]]:
    """The models to run (the patient first), and for each guide the lanes of its model and of its reference.

    Raises:
        UserError: a guide whose vocabulary is not the patient's and cannot be translated.
    """
    lanes: list[LaneSpec] = []
    translations: list[tuple[LoadedModel, frozenset[int], Translation]] = []

    def translation(loaded: LoadedModel, encoder: ChatEncoder) -> Translation | None:
        if not lanes or _shares(patient, loaded.fingerprint.get("tokenizer")):
            return None
        for known, stops, made in translations:
            if stops == encoder.stop_ids and same_vocabulary(known.tokenizer, loaded.tokenizer):
                return made
        width = int(patient.model.get_output_embeddings().weight.shape[0])
        made = Translation(Vocabulary.of(lanes[0].encoder), Vocabulary.of(encoder), width)
        translations.append((loaded, encoder.stop_ids, made))
        return made

    def lane(loaded: LoadedModel, system: str | None) -> int:
        for index, known in enumerate(lanes):
            if known.model is loaded.model and known.system == system:
                return index
        encoder = ChatEncoder.for_model(loaded.model, loaded.tokenizer)
        head = LogitsHead.for_model(loaded.model)
        lanes.append(LaneSpec(loaded.model, encoder, head, system, translation(loaded, encoder)))
        return len(lanes) - 1

    lane(patient, None)
    guide_lanes = [lane(guide.model, guide.system) for guide in guides]
    reference_lanes: list[int | None] = []
    for guide in guides:
        if guide.reference is None:
            reference_lanes.append(None)
        else:
            # Under a system prompt of the guide's own, its reference is not what the patient says without it.
            reference_lanes.append(lane(patient if guide.reference == "patient" else guide.reference, guide.system))
    return lanes, guide_lanes, reference_lanes


def _shares(patient: LoadedModel, tokenizer: str | None) -> bool:
    return tokenizer == patient.fingerprint.get("tokenizer")
