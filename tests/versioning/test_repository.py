"""The graph of dvc.yaml as Prefect's tasks see it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ldm.base.errors import InputError
from ldm.versioning.repository import ancestors, read_graph


def test_stages_come_after_what_they_need_and_keep_their_paths(project: Path) -> None:
    stages = read_graph(project)
    assert [stage.name for stage in stages] == ["shard", "train_unet", "evaluate", "after", "aside"]
    evaluate = stages[2]
    assert set(evaluate.outs) == {"reports/report.html", "reports/bounds.csv", "reports/metrics.csv", "reports/metrics.json"}
    assert set(evaluate.upstream) == {"shard", "train_unet"}


def test_order_survives_any_order_of_the_file(project: Path) -> None:
    text = (project / "dvc.yaml").read_text()
    reordered = dict(reversed(yaml.safe_load(text)["stages"].items()))
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": reordered}, sort_keys=False))
    names = [stage.name for stage in read_graph(project)]
    for stage in read_graph(project):
        assert all(names.index(needed) < names.index(stage.name) for needed in stage.upstream)


def test_ancestors_leave_out_what_the_target_does_not_need(project: Path) -> None:
    stages = read_graph(project)
    assert [stage.name for stage in ancestors(stages, "evaluate")] == ["shard", "train_unet", "evaluate"]
    assert [stage.name for stage in ancestors(stages, "shard")] == ["shard"]
    with pytest.raises(InputError, match="no stage 'evaluat'; it has shard, train_unet"):
        ancestors(stages, "evaluat")


def test_a_stage_knows_all_that_it_needs(project: Path) -> None:
    stages = read_graph(project)
    assert [stage.name for stage in stages if "shard" in stage.needs] == ["train_unet", "evaluate", "after", "aside"]
    assert [stage.name for stage in stages if "train_unet" in stage.needs] == ["evaluate", "after"]
    assert [stage.name for stage in stages if "evaluate" in stage.needs] == ["after"]


def test_data_that_dvc_tracks_without_a_command_is_no_stage(project: Path) -> None:
    (project / "raw").mkdir()
    (project / "raw/a.txt").write_text("a")
    subprocess.run([sys.executable, "-m", "dvc", "add", "--quiet", "raw"], cwd=project, check=True)
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(text.replace("deps: [knob.txt]", "deps: [knob.txt, raw]"))
    stages = read_graph(project)
    assert [stage.name for stage in stages] == ["shard", "train_unet", "evaluate", "after", "aside"]
    assert stages[0].upstream == stages[0].needs == frozenset()


@pytest.mark.parametrize(
    ("text", "says"),
    [("stages: [", "dvc.yaml"), ("stages: {a: {cmd: x, outs: [o]}, b: {cmd: y, outs: [o]}}", "specified in")],
)
def test_a_broken_dvc_yaml_is_the_users_to_mend(project: Path, text: str, says: str) -> None:
    (project / "dvc.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        read_graph(project)


def test_a_folder_that_is_no_dvc_project_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dvc"):
        read_graph(tmp_path)
