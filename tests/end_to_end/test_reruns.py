"""Which stages an edit runs again: those that it can change, and no other."""

import json
import re
import shutil

from repository import REPOSITORY
from ruamel.yaml import YAML
from tiny_pipeline import LOCATE, VARIANTS, Workspace, ran

from dynaroute.config import load_settings, read_yaml


def test_nothing_runs_when_nothing_changed_and_only_what_depends_on_a_change_does(finished, tmp_path):
    workspace = finished.copy(tmp_path / "changed")
    assert ran(workspace.run("dvc", "repro").stdout) == {LOCATE}
    for name in ("dwr/generate.py", "dagformer/variants.py", "training/loop.py", "data/tokens/shards.py"):
        path = workspace.root / "src/dynaroute" / name
        path.write_text(path.read_text().replace('"""', '"""Another docstring. ', 1) + "# a comment\n")
    path = workspace.root / "params.yaml"
    launcher = {"launcher": "torchrun --standalone --nproc_per_node 4"}
    YAML(typ="safe").dump(read_yaml(path) | launcher, path)
    assert ran(workspace.run("dvc", "repro").stdout) == {LOCATE, "resolve_variants"}  # which reads all of the file
    workspace.set_params({"dwr": {"top_k": 1}, "dagformer": {"prefix_tokens": 11}})
    changed = set(json.loads(workspace.run("dvc", "status", "--json", "dvc.yaml").stdout))
    read = {"encode_windows@evaluation", "analyze_topology@P1", "analyze_planted", "resolve_variants"}
    assert changed == read | {"train_dwr", "plot_dwr", "report_dwr"}


def test_a_new_variant_trains_alone(finished, tmp_path):
    workspace = finished.copy(tmp_path / "variant")
    path = workspace.root / "params.yaml"
    params = YAML(typ="safe").load(path.read_text())
    params["variants"]["A8"] = {"from": "base", "lambda_final": 0.0}
    YAML(typ="safe").dump(params, path)
    assert ran(workspace.run("dvc", "repro", "resolve_variants").stdout) == {LOCATE, "resolve_variants"}
    changed = set(json.loads(workspace.run("dvc", "status", "--json", "dvc.yaml").stdout))
    assert changed == {"train_dagformer@A8", "evaluate_nll@A8"}


def test_a_mended_rule_of_overrides_changes_the_knobs_on_which_training_depends(finished, tmp_path):
    workspace = finished.copy(tmp_path / "mended")
    folder = workspace.root / "data/dagformer/variants"
    before = {variant: read_yaml(folder / f"{variant}.yaml") for variant in VARIANTS}
    config = workspace.root / "src/dynaroute/config/__init__.py"
    rule = """{"tau_init": knobs["tau_final"], "lambda_init": knobs["lambda_final"]}"""
    assert rule in config.read_text()
    config.write_text(config.read_text().replace(rule, """{"tau_init": knobs["tau_final"]}"""))
    assert ran(workspace.run("dvc", "repro", "resolve_variants").stdout) == {LOCATE, "resolve_variants"}
    after = {variant: read_yaml(folder / f"{variant}.yaml") for variant in VARIANTS}
    assert after.pop("P2") == before.pop("P2") | {"lambda_init": 0.0}
    assert after == before


def test_training_waits_for_all_tokens_that_it_reads_and_depends_on_no_others(finished, tmp_path):
    workspace = finished.copy(tmp_path / "corpora")
    params = read_yaml(workspace.root / "params.yaml")
    docs = params["corpora"]["docs"]

    def reproduce(target, also_validate_on, **others):
        workspace.set_params({"corpora": {"docs": docs, **others}, "dwr": also_validate_on})
        return ran(workspace.run("dvc", "repro", target).stdout)

    assert reproduce("train_dwr", {}, third=docs) == {LOCATE}
    output = reproduce("train_dwr", {"also_validate_on": ["other"]}, third=docs, other=docs)
    assert {"tokenize@other", "identify_other_tokens@other", "train_dwr"} <= output
    assert "tokenize@third" not in output
    recorded = json.loads((workspace.root / "data/dwr/tokens/other.json").read_text())
    held_out = {**docs, "split": {"validation": 0.02, "test": 0.08}}  # the same text is for training
    reproduce("identify_other_tokens@other", {"also_validate_on": ["other"]}, other=held_out)
    assert "train_dwr" in json.loads(workspace.run("dvc", "status", "--json", "dvc.yaml").stdout)
    assert recorded != json.loads((workspace.root / "data/dwr/tokens/other.json").read_text())


def test_results_that_dvc_did_not_live_to_record_are_recorded_without_training_again(finished, tmp_path):
    workspace = finished.copy(tmp_path / "unrecorded")
    lock = read_yaml(workspace.root / "dvc.lock")
    for out in lock["stages"]["train_dwr"]["outs"]:  # what was trained, once it is neither in the lock file nor cached
        (workspace.root / f".dvc/cache/files/md5/{out['md5'][:2]}/{out['md5'][2:]}").unlink(missing_ok=True)
    del lock["stages"]["train_dwr"]
    YAML(typ="safe").dump(lock, workspace.root / "dvc.lock")
    assert "train_dwr" in json.loads(workspace.run("dvc", "status", "--json").stdout)
    workspace.run("dvc", "commit", "--force", "train_dwr")
    assert workspace.lock() == finished.lock()
    assert ran(workspace.run("dvc", "repro", "export_experts").stdout) == {LOCATE}


def test_the_core_of_the_published_scale_has_a_report_of_its_own(tmp_path):
    """The command of docs/paper-scale.md, which leaves out the variants that take longest."""
    workspace = Workspace.create(tmp_path)
    shutil.copyfile(REPOSITORY / "params/paper.yaml", workspace.root / "params.yaml")
    (command,) = re.findall(r"^sed -i .*$", (REPOSITORY / "docs/paper-scale.md").read_text(), re.MULTILINE)
    workspace.run("bash", "-c", command)
    assert list(load_settings(workspace.root / "params.yaml").variants) == ["S1", "S2", "P1"]
    stages = re.findall(r'"(?:\S*:)?(\w+@\w+)"', workspace.run("dvc", "dag", "--dot", "report_dagformer").stdout)
    found = {stage for stage in stages if stage.startswith(("train_dagformer", "evaluate_nll", "analyze_topology"))}
    expected = {f"{stage}@{name}" for stage in ("train_dagformer", "evaluate_nll") for name in ("S1", "S2", "P1")}
    assert found == expected | {"analyze_topology@P1"}
