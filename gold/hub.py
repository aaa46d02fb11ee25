"""Pushes a trained student to the Hugging Face Hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from gold.errors import CheckpointError, ConfigError
from gold.files import one_line


def prepare_push(name: str, private: bool) -> None:
    """Creates the repository that a run's student will be pushed to, unless there is one: a missing token or right
    shows before anything is trained.

    Raises:
        ConfigError: it can neither be created nor written.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ConfigError(
            f"push_to_hub: no token for {name}: log in (hf auth login) or set HF_TOKEN, or leave push_to_hub out"
        )
    try:
        HfApi().create_repo(name, private=private, exist_ok=True)
    except Exception as error:
        raise ConfigError(f"push_to_hub: {name} cannot be created: {one_line(error)}") from error


def push(folder: Path, name: str) -> str:
    """Uploads a model's folder to its repository; returns the commit's address.

    Raises:
        CheckpointError: it fails; the folder is as it was, and the message has the command that repeats it.
    """
    from huggingface_hub import HfApi

    try:
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Trained student")
    except Exception as error:
        repeat = f"hf upload {name} {shlex.quote(str(folder))} ."
        raise CheckpointError(
            f"{folder} is complete, but was not pushed to {name}: {one_line(error)}; repeat it with: {repeat}"
        ) from error
    return str(commit.commit_url)
