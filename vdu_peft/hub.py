"""Publish a folder that was written, on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from vdu_peft.first_line import first_line


class HubError(RuntimeError):
    """The hub cannot be used; the message says why and what to do."""


def check_hub(repo_id: str) -> str:
    """Whether somebody is logged in to the hub, before any work; returns the full ``owner/name``.

    Whether the token may write there shows at the upload only.

    Args:
        repo_id: ``owner/name``, or a name alone, which is the user's own.

    Raises:
        HubError: nobody is logged in, the hub cannot be reached, or it takes no such name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"hub_model_id: {first_line(error)}") from error
    try:
        user = HfApi().whoami()["name"]
    except Exception as error:  # whatever the hub's transport raises
        raise HubError(f"push_to_hub: {first_line(error)}; log in with `hf auth login` or set HF_TOKEN") from error
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


def push_to_hub(folder: Path, repo_id: str, private: bool) -> str:
    """Upload all files of a folder to a model repository, which is made if need be; returns its address.

    Args:
        private: of one that is made.

    Raises:
        HubError: the hub refuses; the folder stays as it is.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload with vdu_peft")
    except Exception as error:  # whatever the hub's transport raises
        raise HubError(
            f"push_to_hub: {first_line(error)}; {folder} is written, try `hf upload {repo_id} {folder}`"
        ) from error
    return str(url)
