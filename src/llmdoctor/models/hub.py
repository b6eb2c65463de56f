"""A repository of the Hugging Face hub as a folder here, or one line that says why not."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmdoctor.errors import UserError, first_line


def hub_folder(
    spec: str, what: str, *, revision: str | None = None, files: list[str] | None = None,
    but: list[str] | None = None, instead: str = "a folder",
) -> Path:  # fmt: skip
    """The local copy of a hub repository, downloaded as far as it is not there yet.

    Args:
        spec: the hub id.
        what: "model" or "doctor", for the errors.
        revision: a branch, tag or commit; the main branch if None.
        files: patterns of the files that are wanted; all if None.
        but: patterns of those that are not.
        instead: what can be given where there is no hub.

    Raises:
        UserError: no such repository or revision, no access to it, or no hub.
    """
    where = spec if revision is None else f"{spec} at revision {revision}"
    try:
        return Path(snapshot_download(spec, revision=revision, allow_patterns=files, ignore_patterns=but))
    except HFValidationError as error:
        raise UserError(f"{spec!r} is neither a folder here nor a hub id (such as 'name/{what}')") from error
    except GatedRepoError as error:
        raise UserError(f"{spec} is gated: accept its terms on the hub, then log in: hf auth login") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"there is no folder {spec} here and no public {what} of that id on the hub") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{spec} has no revision {revision!r} on the hub") from error
    except (LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"there is no folder {spec} here, and the hub could not be reached for {where} ({first_line(error)}); "
            f"offline, use {instead}"
        ) from error
