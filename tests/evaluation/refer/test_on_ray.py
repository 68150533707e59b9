"""A real cluster of several processes on this machine: the same answers, also where a worker is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle.folder import Bundle
from gap_export.errors import InputError, MissingRequirementError
from gap_export.evaluation.refer.dataset import open_dataset
from gap_export.evaluation.refer.evaluator import Answered, Evaluator
from gap_export.evaluation.refer.journal import Journal, Settings, open_journal
from gap_export.evaluation.refer.run import Work, answer_all, work_of
from tests.recorded import Recorded

pytestmark = pytest.mark.slow

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'gap-export[ray]'")

SETTINGS = Settings(
    manifest_sha256="b", annotations="a", split="all", backend="onnxruntime", keep=None, share=True
)
IMAGES = 8


def make(folder: Path) -> Evaluator:
    from gap_export.bundle.folder import open_bundle
    from gap_export.runtime.backends import open_session

    bundle = open_bundle(folder)
    return Evaluator(bundle, open_session(bundle, "onnxruntime", threads=1))


class Mortal:
    """Ends its process at the third image, as often as there are lives."""

    def __init__(self, folder: Path, marks: Path, lives: int) -> None:
        self.evaluator, self.marks, self.lives, self.asked = make(folder), marks, lives, 0

    def answer_image(self, image: Any, expressions: Any) -> list[Answered]:
        self.asked += 1
        deaths = len(list(self.marks.iterdir()))
        if self.asked == 3 and deaths < self.lives:
            (self.marks / f"{os.getpid()}").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return self.evaluator.answer_image(image, expressions)


class Doomed:
    """Nobody survives its first image."""

    def answer_image(self, image: Any, expressions: Any) -> list[Answered]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []


class Refusing:
    def answer_image(self, image: Any, expressions: Any) -> list[Answered]:
        raise InputError("cannot be taken", subject="the image", hint="take another")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two nodes, each with processes of its own."""
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=node)
    nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    yield nodes.address
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def work() -> tuple[Work, Any]:
    dataset = open_dataset("scenes:3")
    assert dataset.source is not None
    return work_of(dataset.expressions, dataset.source, limit=3 * IMAGES), dataset.source


@pytest.fixture(scope="module")
def expected(
    tiny_bundle: Callable[..., Bundle], work: tuple[Work, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    journal = open_journal(tmp_path_factory.mktemp("here") / "run", SETTINGS)
    answer_all(partial(make, tiny_bundle().folder), *work, journal)
    return {row.id: row.answer for row in journal.rows}


def answers(journal: Journal) -> dict[str, str]:
    """Read back from the disk, where a second answer to one expression would be an error."""
    again = open_journal(journal.folder, SETTINGS)
    return {row.id: row.answer for row in again.rows}


def on_ray(maker: Any, work: tuple[Work, Any], folder: Path, address: str | None, **options: Any) -> Journal:
    from gap_export.parallel.ray import Cluster

    journal = open_journal(folder, SETTINGS)
    answer_all(maker, *work, journal, cluster=Cluster(2, address), **options)
    return journal


def test_the_same_answers(
    cluster: str, tiny_bundle: Callable[..., Bundle], work: Any, expected: dict[str, str], tmp_path: Path
) -> None:
    recorded, again = Recorded(), Recorded()
    maker = partial(make, tiny_bundle().folder)
    journal = on_ray(maker, work, tmp_path / "run", cluster, progress=recorded)
    assert answers(journal) == expected
    assert sum(recorded.counts) == len(expected) == 3 * IMAGES
    on_ray(maker, work, tmp_path / "run", cluster, progress=again)
    assert sum(again.counts) == len(expected), "what is there is told, and not answered again"
    assert answers(journal) == expected


@pytest.mark.parametrize("lives", [pytest.param(1, marks=pytest.mark.long), 2])
def test_killed_workers_lose_nothing(
    lives: int,
    cluster: str,
    tiny_bundle: Callable[..., Bundle],
    work: Any,
    expected: dict[str, str],
    tmp_path: Path,
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    journal = on_ray(partial(Mortal, tiny_bundle().folder, marks, lives), work, tmp_path / "run", cluster)
    assert len(list(marks.iterdir())) >= lives, "no worker was killed: nothing is tested"
    assert answers(journal) == expected


@pytest.mark.long
def test_an_image_that_kills_everyone_is_named(cluster: str, work: Any, tmp_path: Path) -> None:
    with pytest.raises(MissingRequirementError, match="ended 3 times") as caught:
        on_ray(Doomed, work, tmp_path / "run", cluster)
    assert "shapes-" in caught.value.subject


def test_errors_arrive_as_what_they_are(cluster: str, work: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be taken"):
        on_ray(Refusing, work, tmp_path / "run", cluster)


def test_no_cluster_at_that_address(work: Any, tmp_path: Path) -> None:
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(MissingRequirementError, match="cannot be reached"):
        on_ray(Refusing, work, tmp_path / "run", "127.0.0.1:1")
