"""An export on the Hugging Face hub: `--push_to_hub NAME`."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of the library that this version uses
)
from huggingface_hub.utils import validate_repo_id

ADVICE = "Log in with `hf auth login` or set HF_TOKEN, or leave out --push_to_hub."


def check_push(name: str) -> None:
    """Check that a push can work, before any training.

    Raises:
        ValueError: it cannot, and what to do.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub must be NAME or OWNER/NAME; got {name!r}: {error}") from None
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"push_to_hub needs the hub, but HF_HUB_OFFLINE is set. {ADVICE}")
    if get_token() is None:
        raise ValueError(f"push_to_hub needs a token of the hub; there is none. {ADVICE}")
    try:
        HfApi().whoami()
    except (OSError, HTTPError) as error:
        raise ValueError(
            f"push_to_hub needs a hub that knows its token; it says {_reason(error)}. {ADVICE}"
        ) from None


def push_export(folder: Path, name: str) -> list[str]:
    """Upload the models of an export, each to a repository of its own.

    New repositories are private. The generator's has `-generator` after the name.

    Returns:
        The addresses of the repositories.

    Raises:
        ValueError: the hub did not take them.
    """
    api, addresses = HfApi(), []
    for model in ("model", "discriminator", "generator"):
        if not (folder / model).is_dir():
            continue
        repository = f"{name}-generator" if model == "generator" else name
        try:
            created = api.create_repo(repository, private=True, exist_ok=True)
            api.upload_folder(
                repo_id=created.repo_id,
                folder_path=folder / model,
                commit_message=f"{model} of {folder.parent.name}",
            )
        except (OSError, HTTPError) as error:
            raise ValueError(
                f"{folder / model} could not be pushed to {repository}: {_reason(error)}. The "
                "export is kept; the same command pushes it again."
            ) from None
        addresses.append(str(created))
    return addresses


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
