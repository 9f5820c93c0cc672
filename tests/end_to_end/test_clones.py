"""The pipeline in other places than the workspace: experiments of a queue, and clones."""

from tiny_pipeline import LOCATE, VARIANTS, Workspace, ran

from dynaroute.config import read_yaml


def test_two_workers_run_a_queued_sweep_and_its_experiments_share_the_training_that_they_have_in_common(
    finished, tmp_path
):
    workspace = finished.copy(tmp_path / "sweep")
    workspace.set_params({"dagformer.base.training": {"epochs": 0.3, "warmup_steps": 5, "validate_every": 1000}})
    workspace.run("dvc", "exp", "run", "--queue", "-S", "tau_final=0.05,0.1", "prepare_base", "resolve_variants")
    workspace.run("dvc", "queue", "start", "--jobs", "2")  # until the workers have left: they hold on to the output
    assert workspace.run("dvc", "queue", "status").stdout.count("Success") == 2
    bases, taus = [], set()
    for name in workspace.run("dvc", "exp", "list", "--name-only").stdout.split():
        workspace.run("dvc", "get", ".", "data/dagformer/train/base", "--rev", name, "--out", name)
        bases.append((workspace.root / name / "model.safetensors").read_bytes())
        workspace.run("dvc", "get", ".", "data/dagformer/variants", "--rev", name, "--out", f"{name}-variants")
        variants = [read_yaml(workspace.root / f"{name}-variants/{variant}.yaml") for variant in VARIANTS]
        taus.add(tuple(variant["tau_final"] for variant in variants))
    assert bases[0] == bases[1]
    assert taus == {(tau, tau, 0.2, tau, tau) for tau in (0.05, 0.1)}  # J1 has its own
    assert not list((workspace.root / ".scratch/prepare_base").iterdir())


def test_a_clone_pulls_the_results_that_were_pushed(finished, tmp_path):
    workspace = finished.copy(tmp_path / "workspace")
    workspace.run("dvc", "remote", "add", "--default", "store", str(tmp_path / "remote"))
    workspace.commit("remote")
    workspace.run("dvc", "push")
    workspace.run("git", "clone", "-q", str(workspace.root), str(tmp_path / "clone"))
    clone = Workspace(tmp_path / "clone")
    assert not (clone.root / "data").exists()
    clone.run("dvc", "pull")
    stored = [out["path"] for stage in clone.lock().values() for out in stage.get("outs", [])]
    assert "data/dwr/expert_store" in stored
    for path in stored:
        one, other = (folder / path for folder in (workspace.root, clone.root))
        files = sorted(one.rglob("*")) if one.is_dir() else [one]
        for file in files:
            if file.is_file():
                assert (other / file.relative_to(one)).read_bytes() == file.read_bytes(), file
    assert ran(clone.run("dvc", "repro").stdout) == {LOCATE}
    workspace.run("git", "clone", "-q", str(workspace.root), str(tmp_path / "bare"))
    bare = Workspace(tmp_path / "bare")
    assert ran(bare.run("dvc", "repro", "--allow-missing").stdout) == {LOCATE}
    assert not (bare.root / "data/dwr").exists()
    script = bare.root / "stages/dwr/trace_routing.py"
    script.write_text(script.read_text() + "CHANGED = True\n")
    missing = bare.run("dvc", "repro", "--allow-missing", "trace_routing", check=False)
    assert "failed to reproduce 'trace_routing'" in missing.stdout + missing.stderr
    output = bare.run("dvc", "repro", "--allow-missing", "--pull", "trace_routing").stdout
    assert ran(output) == {LOCATE, "trace_routing"}
    assert not (bare.root / "data/dagformer").exists()


def test_a_dry_run_in_a_new_clone_knows_of_edits_once_locate_has_run(finished, tmp_path):
    finished.run("git", "clone", "-q", str(finished.root), str(tmp_path / "clone"))
    clone = Workspace(tmp_path / "clone")
    script = clone.root / "stages/data/collect.py"
    script.write_text(script.read_text() + "CHANGED = True\n")
    dry = ("dvc", "repro", "--allow-missing", "--dry")
    assert ran(clone.run(*dry).stdout) == {LOCATE}
    clone.run("dvc", "repro", "stages/data/dvc.yaml")
    assert ran(clone.run(*dry).stdout) == {LOCATE, "collect@docs"}
