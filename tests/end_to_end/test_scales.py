"""`make scale`: the pipeline with other parameters, beside the default run."""

import shutil

from tiny_pipeline import LOCATE, ran


def test_a_scale_runs_beside_the_default_resumes_and_follows_commits(finished, tmp_path):
    workspace = finished.copy(tmp_path / "scaled")
    params = (workspace.root / "params.yaml").read_text()
    (workspace.root / "params/other.yaml").write_text(params.replace("tau_final: 0.2", "tau_final: 0.3", 1))
    scale = ("python", "scripts/scale.py", "other", "report_dagformer")
    first = ran(workspace.run(*scale).stdout)
    assert "train_dagformer@P1" in first
    assert first.isdisjoint({"train_dwr", "prepare_base", "plant_base"})  # the cache has them
    page = workspace.root / "reports/other/dagformer.md"
    assert page.read_text() != (workspace.root / "reports/dagformer.md").read_text()
    changed = workspace.run("git", "status", "--porcelain", "--untracked-files=all").stdout.split()[1::2]
    assert all(name.startswith(("params/other.yaml", "reports/other/")) for name in changed)
    assert ran(workspace.run("dvc", "repro").stdout) == {LOCATE, "summarize"}
    assert "[other](other/dagformer.md)" in (workspace.root / "reports/summary.md").read_text()
    workspace.commit("a later commit")
    shutil.rmtree(page.parent)
    assert ran(workspace.run(*scale).stdout) == {LOCATE}
    assert page.is_file()


def test_a_scale_that_is_not_there_is_refused_with_those_that_are(finished):
    refused = finished.run("python", "scripts/scale.py", "papers", check=False)
    assert refused.returncode == 1
    assert refused.stderr == "scale: scale papers: there is no params/papers.yaml; scales: gpu, paper, smoke, smollm\n"
