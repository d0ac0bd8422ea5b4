"""A stored adapter on the Hugging Face hub, on request only."""

from lora_one.adapters.stored import StoredAdapter
from lora_one.errors import InputError

# Formats that are, or may hold, pickled objects, and other frameworks' weights.
_REFUSED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5")


def push(adapter: StoredAdapter, repo_id: str, *, private: bool = False) -> str:
    """Upload an adapter's folder as a model repository, which is created if need be.

    The token is the one that huggingface_hub finds: ``HF_TOKEN``, or ``hf auth login``.

    Args:
        adapter: As it was read.
        repo_id: ``owner/name``, or ``name`` for the token's owner.
        private: Whether a new repository is private; one that is there keeps what it is.

    Returns:
        Where the repository is.

    Raises:
        InputError: weights in another format than safetensors, no or no sufficient token, a bad
            ``repo_id``, or a card that the hub does not take.
        RuntimeError: the hub cannot be reached, or fails.
    """
    others = [file for file in adapter.path.rglob("*") if file.suffix.lower() in _REFUSED]
    if others:
        raise InputError(
            f"{adapter.path} holds {others[0].relative_to(adapter.path)}; only safetensors are "
            "pushed. Move it out of the folder."
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=adapter.path,
            commit_message="Upload a LoRA adapter",
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(
                f"the hub does not let this token write to '{repo_id}' ({status}): log in with "
                "`hf auth login`, or set HF_TOKEN to one that may write."
            ) from None
        raise RuntimeError(f"the hub did not take '{repo_id}': {_line(error)}") from error
    except HFValidationError:
        raise InputError(f"'{repo_id}' is no repository's name; expected owner/name.") from None
    except ValueError as error:
        raise InputError(f"the hub does not take the card of {adapter.path}: {error}") from None
    except OfflineModeIsEnabled:
        raise InputError("HF_HUB_OFFLINE=1 forbids to push.") from None
    # Which library speaks HTTP, and so what it raises without a connection, changes between the
    # versions of the hub's client.
    except Exception as error:
        raise RuntimeError(f"the hub cannot be reached: {_line(error)}") from error
    return str(url)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
