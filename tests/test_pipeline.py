"""The real pipeline, end to end: `dvc repro` and `dvc exp run` in a copy of the repository, with tiny settings."""

import csv
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable

import psutil
import pytest
from repository import REPOSITORY
from ruamel.yaml import YAML
from tiny_pipeline import LOCATE, TINY, VARIANTS, Workspace

from dynaroute.config import load_settings, read_yaml
from dynaroute.training.checkpoints import load_checkpoint

# What the scripts that work on one corpus, run or variant are told.
ARGUMENTS = defaultdict(list, {name: ["docs"] for name in ("collect", "tokenize_corpus", "identify_tokens")})
ARGUMENTS |= {"train_dwr_run": ["reference"], "encode_windows": ["training"]}
ARGUMENTS |= {name: ["P1"] for name in ("train_dagformer", "evaluate_nll", "analyze_topology")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Workspace:
    """A workspace after its first `dvc repro`; tests that change it work on a copy."""
    workspace = Workspace.create(tmp_path_factory.mktemp("pipeline") / "repository")
    workspace.run("dvc", "repro")
    workspace.commit("results")
    return workspace


def test_the_pipeline_writes_every_output_and_its_checks_hold(finished):
    for path in finished.hashes():
        assert (finished.root / path).exists(), path
    # A few steps need not learn that much.
    learned = {"validation_loss_is_below_unigram_entropy", "removing_all_head_connections_raises_nll"}
    names = [f"data/dwr/{name}/summary" for name in ("train", "export", "cache", "simulation")]
    names += [f"data/dagformer/{name}" for name in ("base", "analysis/P1/topology", "sensitivity/summary")]
    names += [f"data/dagformer/{name}" for own in VARIANTS for name in (f"train/{own}/training", f"eval/{own}/nll")]
    for name in names:
        checks = json.loads((finished.root / f"{name}.json").read_text())["checks"]
        assert {check for check, holds in checks.items() if holds is False} <= learned, name  # null: not measured
    assert not (finished.root / "gpu/data").exists()  # a pipeline of its own
    for name in ("dwr", "dagformer"):
        assert "| " in (finished.root / f"reports/{name}.md").read_text()
    for figure in (finished.root / "reports").glob("*/*.png"):
        assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_variant_that_continues_another_starts_where_that_one_ended(finished):
    def curve(name):
        with (finished.root / f"data/dagformer/train/{name}/training.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    names = [f"validation_{name}" for name in ("nll_soft", "nll_hard", "nll_baseline", "mean_A", "tau", "lambda")]
    end, start = curve("P1")[-1], curve("P2")[0]
    assert [start[name] for name in names] == [end[name] for name in names]


def test_a_knob_retrains_the_variants_that_inherit_it_and_a_new_variant_trains_alone(finished, tmp_path):
    workspace = finished.copy(tmp_path / "experiment")
    output = workspace.run("dvc", "exp", "run", "-S", "tau_final=0.5").stdout
    inherits = {f"{stage}@{name}" for stage in ("train_dagformer", "evaluate_nll") for name in ("P1", "P2")}
    collected = {LOCATE, "resolve_variants", "compare_variants", "plot_dagformer", "report_dagformer", "summarize"}
    assert ran(output) == inherits | collected | {"analyze_topology@P1"}
    shown = workspace.run("dvc", "params", "diff", "HEAD").stdout
    path = workspace.root / "params.yaml"
    before = str(read_yaml(REPOSITORY / "params.yaml")["tau_final"])
    assert [line.split() for line in shown.splitlines()[1:]] == [["params.yaml", "tau_final", before, "0.5"]]
    params = YAML(typ="safe").load(path.read_text())
    params["variants"]["A8"] = {"from": "base", "lambda_final": 0.0}
    YAML(typ="safe").dump(params, path)
    assert ran(workspace.run("dvc", "repro").stdout) == collected | {"train_dagformer@A8", "evaluate_nll@A8"}


def test_a_slurm_job_is_requeued_at_its_time_limit_alone_and_ends_as_one_without_a_limit(finished, tmp_path):
    longer = {"dwr.training": {**TINY["dwr.training"], "epochs": 0.4}}
    undisturbed, limited = (finished.copy(tmp_path / name) for name in ("undisturbed", "limited"))
    for workspace in (undisturbed, limited):
        workspace.set_params(longer)
    undisturbed.run("dvc", "repro", "train_dwr")
    requeued = tmp_path / "requeued"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {requeued}\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    limited.environment["PATH"] = f"{tmp_path / 'bin'}:{limited.environment['PATH']}"
    limited.environment["SLURM_JOB_ID"] = "17"
    # No signal for the trainer of another job, nor for a process with the number of one that is gone.
    bystanders = []
    for name in ("other", "stale"):
        lock = limited.root / f".scratch/train_dwr/{name}/lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        held = ["flock", "--no-fork", str(lock)] if name == "other" else []
        bystanders.append(subprocess.Popen([*held, "sleep", "600"]))
        lock.write_text(str(bystanders[-1].pid))
    job = limited.start("bash", "scripts/repro.sbatch", "train_dwr")
    limited.wait_for_checkpoint(3)
    job.send_signal(signal.SIGTERM)  # as `scancel` does
    assert job.wait(timeout=60) == 143
    assert not requeued.exists()
    (checkpoint,) = limited.root.glob(".scratch/train_dwr/*/last.safetensors")
    saved = load_checkpoint(checkpoint)[1]["step"]
    job = limited.start("bash", "scripts/repro.sbatch", "train_dwr")
    limited.wait_for_checkpoint(saved + 3)
    job.send_signal(signal.SIGUSR1)  # as `--signal=B:USR1@900` does: to the batch script alone
    assert job.wait(timeout=60) == 0
    assert requeued.read_text() == "requeue 17\n"
    for bystander in bystanders:
        assert bystander.poll() is None
        bystander.kill()
        bystander.wait()
    assert not (limited.root / "data/dwr/train").exists()
    limited.run("bash", "scripts/repro.sbatch", "train_dwr")  # what Slurm does next
    assert requeued.read_text() == "requeue 17\n"
    one, other = undisturbed.lock()["train_dwr"]["outs"], limited.lock()["train_dwr"]["outs"]
    assert [o for o in one if "measured" not in o["path"]] == [o for o in other if "measured" not in o["path"]]


def test_a_worker_runs_the_experiments_of_a_queued_sweep(tmp_path):
    workspace = Workspace.create(tmp_path)
    workspace.run("dvc", "exp", "run", "--queue", "-S", "tau_final=0.05,0.1,0.3", "resolve_variants")
    workspace.run("dvc", "queue", "start")  # until the worker has left: it holds on to the output
    assert workspace.run("dvc", "queue", "status").stdout.count("Success") == 3
    found = set()
    for name in workspace.run("dvc", "exp", "list", "--name-only").stdout.split():
        workspace.run("dvc", "get", ".", "data/dagformer/variants", "--rev", name, "--out", name)
        variants = [read_yaml(workspace.root / name / f"{variant}.yaml") for variant in VARIANTS]
        found.add(tuple(variant["tau_final"] for variant in variants))
    assert found == {(tau, tau, 0.05, 0.2) for tau in (0.05, 0.1, 0.3)}  # A6 and J1 have their own


def test_two_workers_whose_experiments_need_the_same_training_both_end_well(finished, tmp_path):
    workspace = finished.copy(tmp_path / "sweep")
    workspace.set_params({"dagformer.base.training": {"epochs": 0.3, "warmup_steps": 5, "validate_every": 1000}})
    workspace.run("dvc", "exp", "run", "--queue", "-S", "tau_final=0.05,0.1", "prepare_base")
    workspace.run("dvc", "queue", "start", "--jobs", "2")
    assert workspace.run("dvc", "queue", "status").stdout.count("Success") == 2
    bases = []
    for name in workspace.run("dvc", "exp", "list", "--name-only").stdout.split():
        workspace.run("dvc", "get", ".", "data/dagformer/train/base", "--rev", name, "--out", name)
        bases.append((workspace.root / name / "model.safetensors").read_bytes())
    assert bases[0] == bases[1]
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


def ran(output: str) -> set[str]:
    """The stages that DVC says it ran."""
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running")}


def test_the_core_of_the_published_scale_has_a_report_of_its_own(finished, tmp_path):
    """The command of docs/paper-scale.md, which leaves out the variants that take longest."""
    workspace = finished.copy(tmp_path / "paper")
    shutil.copyfile(REPOSITORY / "params.paper.yaml", workspace.root / "params.yaml")
    (command,) = re.findall(r"^sed -i .*$", (REPOSITORY / "docs/paper-scale.md").read_text(), re.MULTILINE)
    workspace.run("bash", "-c", command)
    assert list(load_settings(workspace.root / "params.yaml").variants) == ["S1", "S2", "P1"]
    stages = re.findall(r'"(?:\S*:)?(\w+@\w+)"', workspace.run("dvc", "dag", "--dot", "report_dagformer").stdout)
    found = {stage for stage in stages if stage.startswith(("train_dagformer", "evaluate_nll", "analyze_topology"))}
    expected = {f"{stage}@{name}" for stage in ("train_dagformer", "evaluate_nll") for name in ("S1", "S2", "P1")}
    assert found == expected | {"analyze_topology@P1"}


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


def test_a_second_run_from_scratch_gives_the_same_hashes(finished, tmp_path):
    workspace = finished.copy(tmp_path / "again")
    workspace.run("dvc", "repro", "--force", "--no-run-cache")
    assert workspace.hashes() == finished.hashes()


def test_nothing_runs_when_nothing_changed_and_only_what_depends_on_a_change_does(finished, tmp_path):
    output = finished.run("dvc", "repro").stdout
    assert ran(output) == {LOCATE}
    workspace = finished.copy(tmp_path / "changed")
    for name in ("dwr/generate.py", "dagformer/variants.py", "training/loop.py", "data/tokens/shards.py"):
        path = workspace.root / "src/dynaroute" / name
        path.write_text(path.read_text().replace('"""', '"""Another docstring. ', 1) + "# a comment\n")
    path = workspace.root / "params.yaml"
    launcher = {"launcher": "torchrun --standalone --nproc_per_node 4"}
    YAML(typ="safe").dump(read_yaml(path) | launcher, path)
    assert ran(workspace.run("dvc", "repro").stdout) == {LOCATE, "resolve_variants"}  # which reads all of the file
    workspace.set_params({"dwr": {**TINY["dwr"], "top_k": 1}, "dagformer": {**TINY["dagformer"], "prefix_tokens": 11}})
    changed = set(json.loads(workspace.run("dvc", "status", "--json", "dvc.yaml").stdout))
    read = {"encode_windows@evaluation", "analyze_topology@P1", "train_dwr", "report_dwr_runs", "resolve_variants"}
    assert changed == read


def test_a_mended_rule_of_overrides_changes_the_knobs_on_which_training_depends(tmp_path):
    workspace = Workspace.create(tmp_path)
    workspace.run("dvc", "repro", "resolve_variants")
    before = {variant: read_yaml(tmp_path / f"data/dagformer/variants/{variant}.yaml") for variant in VARIANTS}
    config = tmp_path / "src/dynaroute/config/__init__.py"
    rule = """{"tau_init": knobs["tau_final"], "lambda_init": knobs["lambda_final"]}"""
    assert rule in config.read_text()
    config.write_text(config.read_text().replace(rule, """{"tau_init": knobs["tau_final"]}"""))
    assert ran(workspace.run("dvc", "repro", "resolve_variants").stdout) == {LOCATE, "resolve_variants"}
    after = {variant: read_yaml(tmp_path / f"data/dagformer/variants/{variant}.yaml") for variant in VARIANTS}
    assert after.pop("P2") == before.pop("P2") | {"lambda_init": 0.0}
    assert after == before


def test_training_waits_for_all_tokens_that_it_reads_and_depends_on_no_others(finished, tmp_path):
    workspace = finished.copy(tmp_path / "corpora")
    params = read_yaml(workspace.root / "params.yaml")
    docs = params["corpora"]["docs"]

    def reproduce(also_validate_on, **others):
        workspace.set_params({"corpora": {"docs": docs, **others}, "dwr": {**TINY["dwr"], **also_validate_on}})
        return ran(workspace.run("dvc", "repro", "train_dwr").stdout)

    assert reproduce({}, third=docs) == {LOCATE}
    output = reproduce({"also_validate_on": ["other"]}, third=docs, other=docs)
    assert {"tokenize@other", "identify_other_tokens@other", "train_dwr"} <= output
    assert "tokenize@third" not in output
    recorded = json.loads((workspace.root / "data/dwr/tokens/other.json").read_text())
    held_out = {**docs, "split": {"validation": 0.02, "test": 0.08}}  # the same text is for training
    output = reproduce({"also_validate_on": ["other"]}, other=held_out)
    assert {"tokenize@other", "train_dwr"} <= output
    assert recorded != json.loads((workspace.root / "data/dwr/tokens/other.json").read_text())


def test_a_mistake_in_params_stops_every_stage_with_one_line(finished, tmp_path):
    workspace = finished.copy(tmp_path / "mistake")
    workspace.set_params({"dwr": {**TINY["dwr"], "top_k": 99}})
    for script, done in workspace.run_scripts(ARGUMENTS):
        assert done.returncode == 1, script
        assert done.stderr.splitlines() == [
            f"{script.stem}: params.yaml: dwr.top_k = 99: must be at most num_experts = 4"
        ]


def test_every_script_explains_itself(finished):
    for script, done in finished.run_scripts(defaultdict(lambda: ["--help"])):
        assert f"stages/{script.parent.name}/{script.name}" in done.stdout, script


@pytest.mark.parametrize("committed", [True, False])
def test_recover_mends_an_empty_lock_file_also_where_git_has_none(tmp_path, committed):
    workspace = Workspace(tmp_path)
    shutil.copyfile(REPOSITORY / "scripts/recover.sh", tmp_path / "recover.sh")
    workspace.run("git", "init", "-q")
    if committed:
        (tmp_path / "dvc.lock").write_text("schema: '2.0'\n")
    workspace.commit("before")
    (tmp_path / "dvc.lock").write_text("")
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / ".dvc/tmp/rwlock").write_text("")
    (tmp_path / "data/dwr/.train.tmp/below").mkdir(parents=True)
    (tmp_path / ".git/index.lock").write_text("")  # of a killed `dvc exp run`; with it git checks nothing out
    (tmp_path / ".scratch/running_train_dwr").mkdir(parents=True)
    (tmp_path / ".scratch/running_train_dwr/lock").write_text("1")  # of a process that is gone
    workspace.run("sh", "recover.sh")
    assert not (tmp_path / ".dvc/tmp/rwlock").exists()
    assert not list((tmp_path / "data/dwr").iterdir())
    assert not (tmp_path / ".git/index.lock").exists()
    assert (tmp_path / "dvc.lock").exists() == committed
    if committed:
        assert (tmp_path / "dvc.lock").read_text() == "schema: '2.0'\n"
        (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages:\n  tra")  # cut off
        workspace.run("sh", "recover.sh")
        assert (tmp_path / "dvc.lock").read_text() == "schema: '2.0'\n"
        (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
        workspace.run("sh", "recover.sh")
        assert "stages" in (tmp_path / "dvc.lock").read_text()  # what is not empty stays


def test_a_lock_file_cut_off_at_a_line_end_is_mended_or_only_costs_runs(finished, tmp_path):
    lines = (finished.root / "dvc.lock").read_text().splitlines(keepends=True)
    own_outs = lines.index("  resolve_variants:\n") + lines[lines.index("  resolve_variants:\n") :].index("    outs:\n")
    for what, kept, then in (
        ("refused by DVC", own_outs + 1, len(lines)),  # "outs:" and nothing below it
        ("read by DVC", own_outs + 2, own_outs + 2),  # a stage's output without its hash, and no stage after it
    ):
        workspace = finished.copy(tmp_path / what)
        (workspace.root / "dvc.lock").write_text("".join(lines[:kept]))
        workspace.run("make", "recover")
        assert len((workspace.root / "dvc.lock").read_text().splitlines()) == then, what
        workspace.run("dvc", "repro")
        assert workspace.hashes() == finished.hashes(), what


def test_recover_waits_for_no_lock_but_that_of_a_stage_at_work_also_of_the_gpu_pipeline(tmp_path):
    workspace = Workspace(tmp_path)
    script = (REPOSITORY / "scripts/recover.sh").read_text()
    (tmp_path / "recover.sh").write_text(script.replace("--timeout 60", "--timeout 0.1"))
    workspace.run("git", "init", "-q")
    lock = tmp_path / "gpu/.scratch/running_train_dwr/lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("17")
    workspace.run("sh", "recover.sh")
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused = workspace.run("sh", "recover.sh", check=False)
    assert refused.returncode
    assert "gpu/.scratch/running_train_dwr/lock: process 17 is at work" in refused.stdout


@pytest.fixture
def one_stage(tmp_path) -> Workspace:
    """A repository with one stage, which says that it has started and ends when it is told to."""
    workspace = Workspace(tmp_path)
    for name in ("Makefile", "scripts/recover.sh", "scripts/repro.sbatch"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(REPOSITORY / name, tmp_path / name)
    command = "touch started; until [ -e go ]; do sleep 0.05; done; echo trained > weights"
    (tmp_path / "dvc.yaml").write_text(f"stages: {{train: {{cmd: '{command}', outs: [weights]}}}}")
    workspace.run("git", "init", "-q")
    workspace.run("dvc", "init", "-q")
    return workspace


@pytest.mark.parametrize("mended_by", ["make recover", "a job that starts again", "a job that starts"])
def test_nothing_takes_the_locks_of_a_dvc_that_hashes_what_was_trained(one_stage, tmp_path, mended_by):
    first = one_stage.start("dvc", "repro")
    wait_until((tmp_path / "started").exists)
    first.send_signal(signal.SIGSTOP)  # as long as it takes to hash 40 GB
    (tmp_path / "go").touch()
    stage = psutil.Process(first.pid).children()[0]
    wait_until(lambda: stage.status() == psutil.STATUS_ZOMBIE)
    if mended_by == "make recover":
        refused = one_stage.run("sh", "scripts/recover.sh", check=False)
    else:
        if mended_by == "a job that starts again":
            one_stage.environment["SLURM_RESTART_COUNT"] = "1"
        refused = one_stage.run("bash", "scripts/repro.sbatch", check=False)
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 0
    assert "train" in read_yaml(tmp_path / "dvc.lock")["stages"]
    assert refused.returncode
    named = f"process {first.pid} is at work: " in refused.stdout + refused.stderr
    assert named == (mended_by != "a job that starts")
    assert ("nothing was repaired" in refused.stdout) == (mended_by == "a job that starts again")


def test_recover_refuses_where_the_lock_of_dvc_is_held_by_another_machine(one_stage, tmp_path):
    lock = tmp_path / ".dvc/tmp/lock"
    lock.write_text(" 17\n")
    one_stage.run("sh", "scripts/recover.sh")
    lock.write_text(" 17\n")
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused = one_stage.run("sh", "scripts/recover.sh", check=False)
    assert refused.returncode
    assert refused.stdout.startswith(".dvc/tmp/lock: process 17, on another machine, is at work")
    assert lock.exists()


def test_a_job_that_slurm_starts_again_mends_what_its_dead_node_left(one_stage, tmp_path):
    (tmp_path / "go").touch()
    one_stage.run("bash", "scripts/repro.sbatch")
    (tmp_path / ".dvc/tmp/rwlock").write_text("")  # cut off
    (tmp_path / "weights").unlink()
    assert one_stage.run("bash", "scripts/repro.sbatch", check=False).returncode  # it might be another job's
    one_stage.environment["SLURM_RESTART_COUNT"] = "1"
    one_stage.run("bash", "scripts/repro.sbatch")
    assert (tmp_path / "weights").read_text() == "trained\n"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("own", [False, True])
def test_recover_puts_git_back_on_the_branch_that_a_killed_experiment_left(tmp_path, own):
    workspace = Workspace(tmp_path)
    shutil.copyfile(REPOSITORY / "scripts/recover.sh", tmp_path / "recover.sh")
    workspace.run("git", "init", "-q", "-b", "work")
    workspace.commit("first")
    (tmp_path / "notes").write_text("mine")
    workspace.commit("second")
    workspace.run("git", "checkout", "-q", "--detach", "HEAD~1" if own else "HEAD")  # as a person, or as DVC does
    (tmp_path / "notes").write_text("not committed yet")
    workspace.run("sh", "recover.sh")
    assert workspace.run("git", "rev-parse", "--abbrev-ref", "HEAD").stdout.strip() == ("HEAD" if own else "work")
    assert (tmp_path / "notes").read_text() == "not committed yet"


@pytest.mark.parametrize("command", [("repro", "train_dwr"), ("exp", "run", "train_dwr")], ids=["repro", "exp_run"])
def test_a_killed_training_goes_on_and_ends_as_one_that_was_never_killed(finished, tmp_path, command):
    longer = {"dwr.training": {**TINY["dwr.training"], "epochs": 0.4}}
    undisturbed, killed = (finished.copy(tmp_path / name) for name in ("undisturbed", "killed"))
    for workspace in (undisturbed, killed):
        workspace.set_params(longer)
    undisturbed.run("dvc", *command)
    for step in (3, 20):
        process = killed.start("dvc", *command)
        killed.wait_for_checkpoint(step)
        if step == 3:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()  # DVC alone: the trainer saves and leaves by itself, or the next one would be refused
        process.wait()
        assert not (killed.root / "data/dwr/train").exists()
    killed.run("make", "recover")
    killed.run("dvc", *command)
    assert not list(killed.root.glob(".scratch/train_dwr/*"))
    one, other = undisturbed.lock()["train_dwr"]["outs"], killed.lock()["train_dwr"]["outs"]
    assert [o for o in one if "measured" not in o["path"]] == [o for o in other if "measured" not in o["path"]]
