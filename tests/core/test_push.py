"""A stored adapter goes to a hub (a server on this machine) and comes back the same."""

import pytest
from fake_hub import HubServer, Repository
from huggingface_hub import constants

from lora_one.adapters.command import main

from .tiny import adapted, perturb, tiny_llama


@pytest.fixture
def adapter(tmp_path):
    peft_model = adapted(tiny_llama())
    perturb(peft_model)
    peft_model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("---\nlibrary_name: peft\n---\n# Mine\n")
    return tmp_path / "a"


@pytest.fixture
def push(adapter, monkeypatch, capsys):
    """Run the command against a hub; return exit status, stdout and stderr."""

    def run(hub, repo_id="me/mine", *options, token=None, offline=False):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("HF_TOKEN", hub.token if token is None else token)
        status = main(["push", str(adapter), repo_id, *options])
        return status, *capsys.readouterr()

    return run


def test_push_creates_the_repository_and_uploads_the_folder(adapter, push):
    with HubServer([]) as hub:
        status, out, _ = push(hub, "me/mine", "--private")
        assert (status, out) == (0, f"{hub.url}/me/mine\n")
        (repository,) = hub.repositories
        assert (repository.name, hub.private) == ("me/mine", {"me/mine"})
        assert repository.files == {file.name: file.read_bytes() for file in adapter.iterdir()}


def test_push_updates_a_repository_that_is_there(adapter, push):
    there = Repository("model", "me/mine", {"notes.txt": b"mine", "README.md": b"old"})
    (adapter / "README.md").unlink()
    with HubServer([there]) as hub:
        status, _, err = push(hub)
        assert status == 0
        assert "there is no README.md" in err
        assert there.files["notes.txt"] == b"mine"
        assert "adapter_model.safetensors" in there.files
        assert hub.private == set()


def test_what_cannot_be_pushed_is_refused_in_one_message(adapter, push):
    with HubServer([]) as hub:
        for message, arguments, options in (
            ("log in with `hf auth login`", (), {"token": "hf_reader"}),
            ("'a b' is no repository's name; expected owner/name", ("a b",), {}),
            ("HF_HUB_OFFLINE=1 forbids to push", (), {"offline": True}),
        ):
            status, out, err = push(hub, *arguments, **options)
            assert (status, out) == (2, "")
            assert err.startswith("error: ")
            assert message in err
        (adapter / "optimizer.pt").write_bytes(b"")
        assert "holds optimizer.pt; only safetensors are pushed" in push(hub)[2]
        assert hub.repositories == []


def test_a_hub_that_is_not_there_is_a_failure(push):
    with HubServer([]) as hub:
        pass
    status, _, err = push(hub)
    assert status == 1
    assert err.startswith("failed: the hub cannot be reached")
