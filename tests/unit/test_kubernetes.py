"""docs/kubernetes.yaml is a Job as Kubernetes specifies it, and starts a worker as hpo has it."""

import copy
import re

import kubernetes_validate
import pytest
import yaml
from places import ROOT

from hpo.cli import main
from hpo.worker.ending import STOP_LIMIT

JOB = yaml.safe_load((ROOT / "docs" / "kubernetes.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


@pytest.mark.parametrize("version", ["1.33", "1.37"])
def test_the_manifest_is_a_job_by_the_schema_of_kubernetes(version):
    kubernetes_validate.validate(JOB, version, strict=True)
    wrong = copy.deepcopy(JOB)
    wrong["spec"]["backOffLimitPerIndex"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_a_worker_that_is_preempted_comes_again_and_has_time_to_hand_back():
    # No schema says this: these two belong to Indexed jobs whose pods are never restarted in place.
    assert (JOB["spec"]["completionMode"], POD["restartPolicy"]) == ("Indexed", "Never")
    assert JOB["spec"]["podFailurePolicy"]["rules"][0]["action"] == "Ignore"
    assert POD["terminationGracePeriodSeconds"] > 2 * STOP_LIMIT


def test_the_command_is_one_of_hpo_with_a_trainer_for_each_core():
    program, *words = CONTAINER["command"]
    options = main.parser().parse_args(words)
    assert (program, options.command) == ("hpo", "worker")
    assert str(options.trainers) == CONTAINER["resources"]["limits"]["cpu"] == CONTAINER["resources"]["requests"]["cpu"]


def test_a_worker_may_do_no_more_than_it_must():
    assert POD["securityContext"]["runAsNonRoot"] and not POD["automountServiceAccountToken"]
    allowed = CONTAINER["securityContext"]
    assert allowed["readOnlyRootFilesystem"] and not allowed["allowPrivilegeEscalation"]
    assert allowed["capabilities"] == {"drop": ["ALL"]}
    (user,) = re.findall(r"^USER (\d+):\1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    ids = (POD["securityContext"][key] for key in ("runAsUser", "runAsGroup", "fsGroup"))
    assert set(ids) == {int(user)}, "the image's, whose folders these are"
    mounts = {each["name"]: each for each in CONTAINER["volumeMounts"]}
    secret = next(volume for volume in POD["volumes"] if "secret" in volume)
    environment = {each["name"]: each["value"] for each in CONTAINER["env"]}
    assert environment["HPO_CREDENTIALS"].startswith(mounts[secret["name"]]["mountPath"] + "/")
    assert mounts[secret["name"]]["readOnly"]
    assert not re.search("password|postgresql:", str(JOB)), "secrets come from the mounted file alone"
    hidden = [each["mountPath"] for each in mounts.values()]
    assert not [path for path in hidden if environment["TORCH_HOME"].startswith(f"{path}/")], "weights would be lost"
    assert all("emptyDir" in volume for volume in POD["volumes"] if volume is not secret)
