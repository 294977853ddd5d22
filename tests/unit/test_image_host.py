"""What a host needs for images: rows of `doctor`, packages of `setup`; a host without it has no images."""

from pathlib import Path

import pytest

from worker import doctor, setup
from worker.doctor import POLICY, POLICY_PACKAGE, Row
from worker.settings import Settings


@pytest.mark.parametrize("name", ["skopeo", "umoci"])
def test_a_host_without_it_is_told_the_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    row = doctor._image_program(name)
    assert (row.ok, row.found) == (False, "not on the PATH")
    assert f"for --image: sandbatch setup, or apt-get install {name}" in row.mend


def test_a_host_without_a_policy_is_told_too(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """skopeo copies nothing without one; its own error does not say which package has it."""
    monkeypatch.setattr(doctor, "policy_file", lambda: None)
    monkeypatch.setattr(setup, "policy_file", lambda: None)
    assert POLICY_PACKAGE in doctor._policy().mend
    assert POLICY_PACKAGE in setup.missing_packages(settings)


def test_the_policy_of_the_user_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = tmp_path / "containers/policy.json"
    file.parent.mkdir()
    file.touch()
    assert doctor.policy_file() == file


def test_what_only_images_need_keeps_no_worker_from_its_work(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = [Row(name, "not on the PATH", "", False, "") for name in ("skopeo", "umoci", POLICY)]
    monkeypatch.setattr(doctor, "doctor", lambda _: lacking)
    doctor.check_host(settings)
