"""The trained model on the Hub, once it is saved and proven."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from posttrain.config.schema import TrainingConfig
from posttrain.errors import ModelError, NeedsError


def check_hub(training: TrainingConfig) -> None:
    """Refuse an upload that the Hub would not take.

    Raises:
        NeedsError: publishing is asked for and cannot work: no token here, offline, or a name that the Hub does not
            take.
    """
    if not training.push_to_hub:
        return
    if training.hub_model_id is not None:
        try:
            validate_repo_id(training.hub_model_id)
        except HFValidationError as error:
            raise NeedsError(
                str(error).splitlines()[0], where="training.hub_model_id", hint="give owner/name"
            ) from error
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise NeedsError(
            "HF_HUB_OFFLINE is set, so nothing can be published", where="training.push_to_hub", hint="unset it"
        )
    if huggingface_hub.get_token() is None:
        raise NeedsError(
            "there is no token for the Hub here",
            where="training.push_to_hub",
            hint="log in with `hf auth login`, or set HF_TOKEN",
        )


def publish(training: TrainingConfig, run_dir: Path) -> str:
    """Upload `model`, and `adapter` into a folder of that name; call on the main rank. Returns the repository's name.

    Raises:
        ModelError: it could not be uploaded; what was trained is on disk all the same.
    """
    api = HfApi()
    try:
        created = api.create_repo(
            training.hub_model_id or run_dir.resolve().name, private=training.hub_private_repo, exist_ok=True
        )
        for name, place in (("model", None), ("adapter", "adapter")):
            if (run_dir / name).is_dir():
                api.upload_folder(
                    repo_id=created.repo_id,
                    folder_path=run_dir / name,
                    path_in_repo=place,
                    commit_message=f"Trained with posttrain: {name}",
                )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"the trained model is saved and could not be published: {str(error).strip().splitlines()[0]}",
            where="training.push_to_hub",
            hint=f"upload it with `hf upload NAME {run_dir / 'model'}`",
        ) from error
    return created.repo_id
