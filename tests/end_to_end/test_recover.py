"""`make recover` repairs what kills leave, and touches nothing while anything is at work."""

import fcntl
import shutil
import signal

import psutil
import pytest
from repository import REPOSITORY
from tiny_pipeline import Workspace, wait_until

from dynaroute.config import read_yaml


@pytest.fixture
def repository(tmp_path) -> Workspace:
    """A git repository with nothing in it but the script."""
    shutil.copyfile(REPOSITORY / "scripts/recover.sh", tmp_path / "recover.sh")
    workspace = Workspace(tmp_path)
    workspace.run("git", "init", "-q", "-b", "work")
    return workspace


@pytest.mark.parametrize("committed", [True, False])
def test_recover_mends_an_empty_lock_file_also_where_git_has_none(repository, tmp_path, committed):
    if committed:
        (tmp_path / "dvc.lock").write_text("schema: '2.0'\n")
    repository.commit("before")
    (tmp_path / "dvc.lock").write_text("")
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / ".dvc/tmp/rwlock").write_text("")
    (tmp_path / "data/dwr/.train.tmp/below").mkdir(parents=True)
    (tmp_path / ".git/index.lock").write_text("")  # of a killed `dvc exp run`; with it git checks nothing out
    (tmp_path / ".scratch/running_train_dwr").mkdir(parents=True)
    (tmp_path / ".scratch/running_train_dwr/lock").write_text("1")  # of a process that is gone
    repository.run("sh", "recover.sh")
    assert not (tmp_path / ".dvc/tmp/rwlock").exists()
    assert not list((tmp_path / "data/dwr").iterdir())
    assert not (tmp_path / ".git/index.lock").exists()
    assert (tmp_path / "dvc.lock").exists() == committed
    if committed:
        assert (tmp_path / "dvc.lock").read_text() == "schema: '2.0'\n"
        (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages:\n  tra")  # cut off
        repository.run("sh", "recover.sh")
        assert (tmp_path / "dvc.lock").read_text() == "schema: '2.0'\n"
        (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
        repository.run("sh", "recover.sh")
        assert "stages" in (tmp_path / "dvc.lock").read_text()  # what is not empty stays


def test_recover_waits_for_no_lock_but_that_of_a_stage_at_work(repository, tmp_path):
    script = tmp_path / "recover.sh"
    script.write_text(script.read_text().replace("--timeout 60", "--timeout 0.1"))
    lock = tmp_path / ".scratch/running_train_dwr/lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("17")
    repository.run("sh", "recover.sh")
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused = repository.run("sh", "recover.sh", check=False)
    assert refused.returncode
    assert ".scratch/running_train_dwr/lock: process 17 is at work" in refused.stdout


@pytest.mark.parametrize("own", [False, True])
def test_recover_puts_git_back_on_the_branch_that_a_killed_experiment_left(repository, tmp_path, own):
    repository.commit("first")
    (tmp_path / "notes").write_text("mine")
    repository.commit("second")
    repository.run("git", "checkout", "-q", "--detach", "HEAD~1" if own else "HEAD")  # as a person, or as DVC does
    (tmp_path / "notes").write_text("not committed yet")
    repository.run("sh", "recover.sh")
    assert repository.run("git", "rev-parse", "--abbrev-ref", "HEAD").stdout.strip() == ("HEAD" if own else "work")
    assert (tmp_path / "notes").read_text() == "not committed yet"


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
