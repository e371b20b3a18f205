"""The file of settings that worked: written whole, by many at once; a broken one is none."""

import fcntl
import json
import multiprocessing
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samples import SETTINGS, remembered
from structlog.testing import capture_logs

from deployments import settings_store
from deployments.settings_store import MOST_MODELS, SettingsStore, state_folder
from vram.ladder import Rung

OF = {"model": "fake", "version": "1"}


@pytest.fixture
def store(tmp_path: Path) -> SettingsStore:
    return SettingsStore(tmp_path, OF)


RUNG = Rung(name="half", settings=SETTINGS, price="much", skipped_reason=None)


def test_what_the_plan_or_the_user_does_not_allow_is_not_remembered(
    ladder: Callable[[int], tuple[Rung, ...]],
) -> None:
    asked, half, quarter = ladder(0)
    found = replace(remembered(quarter), path=(asked, half))
    assert found.course(asked, lambda settings: settings != quarter.settings) is None
    course = found.course(asked, lambda settings: settings != half.settings)
    assert course is not None
    assert course.path == (asked,)


def test_what_is_written_is_read_again_and_forgotten(store: SettingsStore) -> None:
    assert store.read() is None
    store.write(replace(remembered(RUNG), path=(RUNG, RUNG), failed_climbs=3))
    assert store.read() == replace(remembered(RUNG), path=(RUNG, RUNG), failed_climbs=3)
    store.forget()
    assert store.read() is None


def test_another_model_version_or_plan_reads_nothing(tmp_path: Path, store: SettingsStore) -> None:
    store.write(remembered(RUNG))
    for other in ({"version": "2"}, {"model": "other"}, {"planned": 1}):
        assert SettingsStore(tmp_path, {**OF, **other}).read() is None


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"{}", b'{"format": 1, "of": {}, "remembered": {}}', b"[" * 100_000],
)
def test_a_file_that_can_not_be_read_is_warned_of_once_and_passed_over(
    store: SettingsStore, content: bytes
) -> None:
    store.write(remembered(RUNG))
    store._path.write_bytes(content)
    with capture_logs() as logs:
        assert store.read() is None
        assert store.read() is None
    assert [line["event"] for line in logs] == ["settings_not_read"]
    store.write(remembered(RUNG))
    assert store.read() == remembered(RUNG)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ('"max_model_len": 2048', '"max_model_len": "2048"'),
        ('"max_model_len": 2048', '"max_model_len": 0'),
    ],
)
def test_settings_that_are_none_are_not_read(store: SettingsStore, part: str, other: str) -> None:
    store.write(remembered(RUNG))
    text = store._path.read_text()
    assert part in text
    store._path.write_text(text.replace(part, other))
    assert store.read() is None


def test_a_folder_that_can_not_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "settings").write_text("a file is in its place")
    store = SettingsStore(tmp_path, OF)
    with capture_logs() as logs:
        store.write(remembered(RUNG))
        assert store.take_lease("a", now_s=0.0, until_s=1.0)
    assert [line["event"] for line in logs] == ["settings_not_kept"]


def test_dev_null_keeps_nothing_and_says_nothing() -> None:
    store = SettingsStore(state_folder({"BALLAST_STATE": "/dev/null"}), OF)
    with capture_logs() as logs:
        store.write(remembered(RUNG))
        assert store.read() is None
        assert store.take_lease("a", now_s=0.0, until_s=1.0)
        store.release_lease("a")
        store.forget()
    assert logs == []


def test_a_lease_is_one_replica_s_until_it_is_released_or_expires(
    tmp_path: Path, store: SettingsStore
) -> None:
    other = SettingsStore(tmp_path, OF)
    assert store.take_lease("a", now_s=0.0, until_s=10.0)
    assert not other.take_lease("b", now_s=9.0, until_s=20.0)
    other.release_lease("b")
    assert store.take_lease("a", now_s=9.0, until_s=12.0)
    assert other.take_lease("b", now_s=12.0, until_s=20.0)
    other.release_lease("b")
    assert store.lease_holder(12.0) is None


def test_the_store_is_bounded(tmp_path: Path) -> None:
    for number in range(MOST_MODELS + 3):
        SettingsStore(tmp_path, {"model": number}).write(remembered(RUNG))
    assert len(list((tmp_path / "settings").glob("*.json"))) == MOST_MODELS


def test_a_file_is_replaced_as_a_whole_and_under_the_lock(
    store: SettingsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_locked(path: Path, document: Mapping[str, Any]) -> None:
        with (path.parent / "lock").open("w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        replaced(path, document)

    store.write(remembered(RUNG))
    replaced = settings_store._replace
    monkeypatch.setattr(settings_store, "_replace", replace_locked)
    with store._path.open() as reader:
        store.write(replace(remembered(RUNG), failed_climbs=7))
        assert json.load(reader)["remembered"]["failed_climbs"] == 0
    assert store.take_lease("a", now_s=0.0, until_s=1.0)


def test_processes_that_write_at_once_leave_one_whole_file(
    tmp_path: Path, store: SettingsStore
) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_often, args=(tmp_path, n)) for n in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    found = store.read()
    assert found is not None
    assert found.failed_climbs in (1, 2)
    assert sorted(path.suffix for path in (tmp_path / "settings").iterdir()) == ["", ".json"]


def write_often(folder: Path, number: int) -> None:
    store = SettingsStore(folder, OF)
    for _ in range(100):
        store.write(replace(remembered(RUNG), failed_climbs=number))
        assert store.read() is not None
        if store.take_lease(str(number), now_s=0.0, until_s=1.0):
            assert store.lease_holder(0.0) == str(number)
            store.release_lease(str(number))
