"""Code of a user's runs where it is trusted, and nowhere else: not on a word of the database, nor of the artifacts."""

import own_network
import pytest
from sqlalchemy import text

from hpo import settings, study
from hpo.planning import plans
from hpo.planning.preparation import prepare
from hpo.tracking.client import Tracker
from models import user

pytestmark = pytest.mark.acceptance


@pytest.mark.slow
def test_a_study_with_code_is_attacked_trained_and_handed_out(shell, data, tmp_path):
    file = own_network.write(tmp_path / "a", data=data, name="guarded", epochs=40, training="learning_rate = 0.02")
    ready, tracker = prepare(study.load(str(file))), Tracker(shell.tracking_uri)
    read = settings.read({"HPO_HOME": str(tmp_path / "planner")})
    shell.queue.install()
    row = plans.plan(ready, shell.queue, tracker, read, shell.database_url)
    (digest,) = ready.study.code
    output = shell.hpo("worker", "--study", "guarded", code=1)
    assert f"add --trust-code {digest}" in output and f"artifacts/code/{digest}/SHA256SUMS" in output
    assert [(job.state, job.attempt) for job in shell.trials("guarded")] == [("waiting", 0)] * 2

    # The database and the artifacts say other code, which would leave a mark.
    evil = {"models/net.py": f"import pathlib\npathlib.Path({str(tmp_path / 'mark')!r}).touch()\n".encode()}
    user.write(evil, tmp_path / "evil" / user.digest_of(evil))
    for path in filter(lambda path: path.is_file(), (tmp_path / "evil").rglob("*")):
        tracker.upload(row.facts.study_run_id, path, f"code/{path.parent.relative_to(tmp_path / 'evil')}")
    change = "UPDATE hpo.{} SET spec = replace(spec::text, :old, :new)::{}"
    for old, new in ((digest, user.digest_of(evil)), (user.digest_of(evil), digest)):
        with shell.queue.engine.begin() as connection:
            for table, kind in (("study", "json"), ("job", "json")):
                connection.execute(text(change.format(table, kind)), {"old": old, "new": new})
        if new != digest:
            assert f"add --trust-code {new}" in shell.hpo(
                "worker", "--study", "guarded", "--trust-code", digest, code=1
            )
    assert not (tmp_path / "mark").exists()

    shell.hpo("worker", "--study", "guarded", "--trust-code", digest)
    jobs = shell.trials("guarded")
    assert [job.state for job in jobs] == ["done"] * 2 and [job.spec.parameters for job in jobs] == [51, 93]
    shell.hpo("download", "--study", "guarded", tmp_path / "model")
    image = sorted(data.glob("*.png"))[0]
    assert shell.hpo("predict", tmp_path / "model", image, "--trust-code", digest).startswith("image,C11")
    assert "not checked" in shell.hpo("doctor", "--study", "guarded")


@pytest.mark.long
def test_a_fault_in_code_is_told_with_its_line_before_anything_is_planned(shell, data, tmp_path):
    broken = own_network.write(tmp_path / "b", data=data, name="broken-code")
    net = tmp_path / "b" / "models" / "net.py"
    net.write_text(net.read_text().replace("return self.last(hidden)", "return self.last(hidden, 1)"))
    output = shell.hpo("run", "--study", broken, code=1)
    assert f"{net}, line {net.read_text().split('hidden, 1)')[0].count(chr(10)) + 1}: TypeError: " in output
    assert output.rstrip().endswith("Nothing was planned.") and not shell.queue.studies()
