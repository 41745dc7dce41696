"""Figures of a machine are measured once, kept, and never mistaken for another machine's."""

import json
import threading
import time
from pathlib import Path

import pytest

from vidsparse.kernels.cpu import machine, store

NAMES = ("a", "b")


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store, "_records", {})


class Measure:
    """Counts how often it is asked; other figures every time."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, float]:
        self.times += 1
        return {"a": float(self.times), "b": 0.5}


def recall(measure: Measure, **key: object) -> store.Record:
    return store.recall("test", key, measure, NAMES)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "vidsparse").glob("*.json"))


def test_once_per_process_and_machine(tmp_path: Path) -> None:
    measure = Measure()
    first = recall(measure, n=1)
    assert recall(measure, n=1) is first and measure.times == 1
    store.forget()  # as a new process
    assert recall(measure, n=1) == first and measure.times == 1
    assert recall(measure, n=2).figures["a"] == 2.0
    assert len(files(tmp_path)) == 2 and first.problem is None


def test_forgotten_on_disk(tmp_path: Path) -> None:
    measure = Measure()
    recall(measure)
    store.forget(disk=True)
    assert not files(tmp_path)
    assert recall(measure).figures["a"] == 2.0


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        "\x00\x01",
        '{"figures": 3, "key": 1, "measured": ""}',
        "nan",
        "negative",
        "foreign",
        "missing",
    ],
)
def test_what_cannot_be_read_is_measured_again(tmp_path: Path, content: str) -> None:
    measure = Measure()
    recall(measure)
    (file,) = files(tmp_path)
    kept = json.loads(file.read_text())
    if content == "nan":
        kept["figures"]["a"] = float("nan")
    elif content == "negative":
        kept["figures"]["a"] = -1
    elif content == "foreign":
        kept["key"]["cpu"] = "another"
    elif content == "missing":
        del kept["figures"]["b"]
    named = content in ("nan", "negative", "foreign", "missing")
    file.write_text(json.dumps(kept) if named else content)
    store.forget()
    assert recall(measure).figures == {"a": 2.0, "b": 0.5}
    store.forget()
    assert recall(measure).figures["a"] == 2.0  # the bad file was replaced


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS"])
def test_other_settings_have_figures_of_their_own(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    measure = Measure()
    recall(measure)
    monkeypatch.setenv(name, "AVX2")
    assert recall(measure).figures["a"] == 2.0


def test_another_cpu_has_figures_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Measure()
    recall(measure)
    monkeypatch.setattr(machine, "name", lambda: "another")
    assert recall(measure).figures["a"] == 2.0


def test_without_a_folder_figures_hold_for_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file where the folder should be; no home at all."""
    measure = Measure()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    record = recall(measure)
    assert record.problem is not None and "cannot be written" in record.problem
    assert recall(measure) is record

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", homeless)
    record = recall(measure, n=2)
    assert "no home" in str(record.problem) and recall(measure, n=2) is record
    assert measure.times == 2


def test_threads_that_ask_together_get_one_measurement() -> None:
    measured = []

    def slow() -> dict[str, float]:
        time.sleep(0.1)
        measured.append(1)
        return {"a": len(measured), "b": 0.0}

    found = []
    ask = lambda: found.append(store.recall("test", {}, slow, NAMES))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 1 and len({id(record) for record in found}) == 1


def test_a_measurement_may_ask_for_another_kind() -> None:
    inner = Measure()

    def outer() -> dict[str, float]:
        return store.recall("inner", {}, inner, NAMES).figures

    assert store.recall("outer", {}, outer, NAMES).figures["a"] == 1.0


def test_what_could_not_be_measured_is_not_kept(tmp_path: Path) -> None:
    def fail() -> dict[str, float]:
        raise store.Unmeasured({"a": 0.0, "b": 0.0}, "no child")

    record = store.recall("test", {}, fail, NAMES)
    assert record.reason == "no child" and not files(tmp_path)
