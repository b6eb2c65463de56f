"""Who guides: doctors ready to decode beside a patient."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from llmdoctor.data.chat import ChatEncoder
from llmdoctor.decoding.adapter import Adapter
from llmdoctor.decoding.network import network_of
from llmdoctor.errors import UserError
from llmdoctor.models.doctor import ADAPTER_FOLDER, Doctor, DoctorConfig, check_doctor, load_base, local_folder
from llmdoctor.models.loading import LoadedModel, load_model, placement_of
from llmdoctor.models.logps import LogitsHead
from llmdoctor.models.vocab import Translation, Vocabulary, same_vocabulary

FORMS = ("ratio", "product")

_logger = logging.getLogger(__name__)


@dataclass
class Guide:
    """One model whose log-probabilities, times β, are added to the patient's.

    Attributes:
        name: by which requests give it a β.
        model: the guiding LM, adapters merged; where `adapter` is given, the model that it is on.
        reference: subtracted from it (the ratio form): a model, the string "patient" where the doctor's base is the
            patient itself (then it costs no forward pass), or None for the product form.
        system: a system prompt that the guide alone sees.
        adapter: the guide is `model` with this on it. On the patient's own model, patient and guide are then run in
            one pass over one copy of the weights.
    """

    name: str
    model: LoadedModel
    reference: LoadedModel | Literal["patient"] | None = None
    system: str | None = None
    adapter: Adapter | None = None


def load_guide(
    path: str | Path,
    patient: LoadedModel,
    *,
    name: str | None = None,
    form: str = "ratio",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
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
        dtype, device: as `load_model`'s, for models that are loaded here; the patient's own if None (device "auto"
            where the patient is spread over several). In the patient's own pass a doctor works as the patient does.
        trust_remote_code: as `load_model`'s.

    Raises:
        UserError: an unknown form, no doctor there or one that is not whole, or a base that is not there or is not the
            one that it was trained on.
    """
    if form not in FORMS:
        raise UserError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    folder = local_folder(path)
    config = DoctorConfig.load(folder)
    given = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    options = placement_of(patient) | {name: value for name, value in given.items() if value is not None}
    same_base = config.is_on(patient)
    # The same weights under another name will do: the recorded base may be a folder of another machine.
    spec = patient.spec if same_base else config.base
    # Beside coarser weights than its base's a doctor would also say what was lost in between.
    on_patient = same_base and not patient.quantised
    if same_base and not on_patient:
        _logger.warning(
            "the patient is quantised, and the doctor %s was trained on weights that are not: a copy of %s is loaded "
            "for it",
            *(path, spec),
        )
    name = name or config.dimension or Path(path).name
    learnt_from = config.rewards_fingerprint.get("tokenizer")
    if learnt_from and not _shares(patient, learnt_from):
        _logger.warning(
            "the doctor %s was trained on the rewards of a patient with another tokenizer (%s) than %s has (%s)",
            *(path, learnt_from, patient.spec, patient.fingerprint.get("tokenizer")),
        )
    reference: LoadedModel | Literal["patient"] | None = None
    if config.lora:
        # One copy of the base serves the doctor, its reference and, where it is the same, the patient.
        base = patient if on_patient else load_base(folder, spec, **options)
        check_doctor(folder, config, base)
        adapter = None
        if network_of(base.model.get_decoder()) is not None:
            adapter = Adapter.load(folder / ADAPTER_FOLDER, base.model)
        if adapter is not None:
            if form == "ratio":
                reference = "patient" if on_patient else base
            return Guide(name, base, reference, adapter=adapter)
        if form == "ratio":
            reference = "patient" if on_patient else base
        # Merging changes the weights, which the patient or the reference still needs.
        if on_patient or form == "ratio":
            _logger.warning(
                "the adapter of the doctor %s cannot be run beside its base (it is more than plain LoRA, or the base "
                "is of an architecture that is run by transformers): it is merged into a second copy of %s",
                *(path, spec),
            )
        own = load_model(spec, **options) if on_patient or form == "ratio" else base
        return Guide(name, Doctor.from_pretrained(folder, base=own, **options).merged(), reference)
    if form == "ratio":
        base = patient if on_patient else load_base(folder, spec, **options)
        check_doctor(folder, config, base)
        reference = "patient" if on_patient else base
    return Guide(name, Doctor.from_pretrained(folder, **options).merged(), reference)


@dataclass
class LaneSpec:
    """One model that runs at every position, how it reads a conversation, and the voices it has there.

    Attributes:
        voices: adapters that it is run with; None is the bare model.
        translation: into the patient's vocabulary; None where the model shares it.
        tapped: layers whose outputs stand behind the last hidden states, for a draft model that reads them.
    """

    model: Any
    encoder: ChatEncoder
    head: LogitsHead
    system: str | None = None
    voices: list[Adapter | None] = field(default_factory=lambda: [None])
    translation: Translation | None = None
    tapped: tuple[int, ...] = ()


Voice = tuple[int, int]
"""A lane's number and the number of a voice in it."""


def lanes_of(patient: LoadedModel, guides: list[Guide]) -> tuple[list[LaneSpec], list[Voice], list[Voice | None]]:
    """The models to run (the patient first), and for each guide the voices of itself and of its reference.

    The patient's own voice is the first of the first lane.

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

    def voice(loaded: LoadedModel, system: str | None, adapter: Adapter | None = None) -> Voice:
        for index, known in enumerate(lanes):
            if known.model is loaded.model and known.system == system:
                if not any(adapter is heard for heard in known.voices):
                    # A lane that translates reads each voice's own split of the text.
                    if known.translation is not None:
                        continue
                    known.voices.append(adapter)
                return index, next(place for place, heard in enumerate(known.voices) if heard is adapter)
        encoder = ChatEncoder.for_model(loaded.model, loaded.tokenizer)
        head = LogitsHead.for_model(loaded.model)
        lanes.append(LaneSpec(loaded.model, encoder, head, system, [adapter], translation(loaded, encoder)))
        return len(lanes) - 1, 0

    voice(patient, None)
    guide_voices = [voice(guide.model, guide.system, guide.adapter) for guide in guides]
    references: list[Voice | None] = []
    for guide in guides:
        if guide.reference is None:
            references.append(None)
        else:
            # Under a system prompt of the guide's own, its reference is not what the patient says without it.
            references.append(voice(patient if guide.reference == "patient" else guide.reference, guide.system))
    return lanes, guide_voices, references


def _shares(patient: LoadedModel, tokenizer: str | None) -> bool:
    return tokenizer == patient.fingerprint.get("tokenizer")
