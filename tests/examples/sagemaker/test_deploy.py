"""deploy.py creates and queries endpoints; cleanup.py deletes them, and deletes nothing else."""

from __future__ import annotations

import io
import json
import time
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from aws_on_loopback import BUCKET, ROLE, SCRIPTS
from botocore.exceptions import ClientError
from moto.iam.access_control import IAMPolicy, PermissionResult

from esm_efficient import Prediction, Task
from esm_efficient.demo.proteins import KNOWN_PROTEINS

GPU = "ml.g4dn.xlarge"  # an instance type that moto knows
IMAGE = "huggingface-pytorch-inference:2.6.0-transformers5.5.3-{}-py312-"


@pytest.fixture
def job(aws):
    """A completed training job."""
    aws.client("sagemaker").create_training_job(
        TrainingJobName="job",
        AlgorithmSpecification={"TrainingImage": "image", "TrainingInputMode": "File"},
        RoleArn=ROLE,
        OutputDataConfig={"S3OutputPath": f"s3://{BUCKET}/work/output"},
        ResourceConfig={"InstanceType": "ml.g5.2xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30},
        StoppingCondition={"MaxRuntimeInSeconds": 60},
    )
    return "job"


def will_answer(aws, answers):
    """Set the next responses of moto's endpoints."""
    results = [{"Body": json.dumps([answer]), "ContentType": "application/json"} for answer in answers]
    body = json.dumps({"results": results}).encode()
    request = urllib.request.Request(f"{aws.address}/moto-api/static/sagemaker/endpoint-results", body)
    urllib.request.urlopen(request, timeout=20).close()


def deploy(aws, name, *options):
    answers = [
        {"name": protein, "label": "membrane", "score": 0.875, "probabilities": {}} for protein in KNOWN_PROTEINS
    ]
    will_answer(aws, answers)
    return aws.run("deploy.py", "--job", "job", "--endpoint", name, "--role", ROLE, *options)


def exists(aws, kind, name):
    word = "".join(part.title() for part in kind.split("_"))
    sagemaker = aws.client("sagemaker")
    try:
        return getattr(sagemaker, f"describe_{kind}")(**{f"{word}Name": name})
    except sagemaker.exceptions.ClientError:
        return None


@pytest.mark.parametrize("serverless", [False, True], ids=["real-time", "serverless"])
def test_an_endpoint_is_created_queried_and_deleted(aws, job, serverless):
    name = "serverless" if serverless else "real-time"
    options = (
        ("--serverless", "--memory-mb", 4096, "--concurrency", 3)
        if serverless
        else ("--instances", 2, "--instance-type", GPU)
    )
    done = deploy(aws, name, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    for protein in KNOWN_PROTEINS:
        assert protein in done.stdout
    assert done.stdout.count("membrane    0.88") == len(KNOWN_PROTEINS)

    model = aws.sent("create_model")
    container = model["PrimaryContainer"]
    assert IMAGE.format("cpu" if serverless else "gpu") in container["Image"]
    assert container["ModelDataUrl"] == f"s3://{BUCKET}/work/output/job/output/model.tar.gz"
    environment = {
        "SAGEMAKER_PROGRAM": "inference.py",
        "ESM_EFFICIENT_MAX_RESIDUES": "4000" if serverless else "200000",
    }
    assert container["Environment"] == environment | ({"SAGEMAKER_MODEL_SERVER_WORKERS": "1"} if serverless else {})
    assert model["ExecutionRoleArn"] == ROLE
    (variant,) = aws.sent("create_endpoint_config")["ProductionVariants"]
    assert variant["ModelName"] == model["ModelName"] == name
    if serverless:
        assert variant["ServerlessConfig"] == {"MemorySizeInMB": 4096, "MaxConcurrency": 3}
        assert "InstanceType" not in variant
    else:
        assert (variant["InstanceType"], variant["InitialInstanceCount"]) == (GPU, 2)
    assert exists(aws, "endpoint", name)["EndpointStatus"] == "InService"
    for request in (model, aws.sent("create_endpoint_config"), aws.sent("create_endpoint")):
        assert {"Key": "created-by", "Value": "esm-efficient"} in request["Tags"]

    again = aws.run("deploy.py", "--job", "job", "--endpoint", name, "--role", ROLE)
    assert f"endpoint and endpoint config and model named {name} exist already" in again.stderr
    asked = aws.run("cleanup.py", "--endpoint", name)
    assert asked.returncode == 1
    assert f"endpoint {name}" in asked.stderr
    assert exists(aws, "endpoint", name)
    assert aws.run("cleanup.py", "--endpoint", name, "--yes").returncode == 0
    assert not any(exists(aws, kind, name) for kind in ("endpoint", "endpoint_config", "model"))
    last = aws.run("cleanup.py", "--endpoint", name, "--yes")
    assert (last.returncode, last.stdout) == (1, "")
    assert f"nothing is named {name} in us-east-1: is --region another one?" in last.stderr
    assert f"cleanup.py --endpoint {name} --region us-east-1 --yes" in done.stdout


@pytest.mark.parametrize(
    ("kind", "values", "labels", "shown"),
    [
        ("single_label_classification", [0.25, 0.75], ("yes",), ("yes", "0.75")),
        ("multi_label_classification", [0.75, 0.75], ("no", "yes"), ("no, yes", "")),
        ("multi_label_classification", [0.25, 0.25], (), ("no label", "")),
        ("regression", [-1.5, 61.23456], (), ("no -1.5, yes 61.23", "")),
        ("token_classification", [[0.25, 0.75]] * 3, ("yes",) * 3, ("yes, yes, yes (3 residues)", "")),
        (
            "token_classification",
            [[0.25, 0.75]] * 262,
            ("yes",) * 262,
            ("yes, yes, yes, yes, yes, ... (262 residues)", ""),
        ),
    ],
)
def test_the_answers_of_every_task_are_shown_on_one_line(monkeypatch, kind, values, labels, shown):
    monkeypatch.syspath_prepend(SCRIPTS)
    import deploy as script

    prediction = Prediction(Task(kind, ("no", "yes")), np.array(values), labels)
    assert script.row_of({"name": "P1", **prediction.to_dict()}) == ("P1", *shown)


class Endpoint:
    """Refuses the longest protein as an endpoint of SageMaker does, or fails at each of them."""

    def __init__(self, status):
        self.status = status

    def invoke(self, *, body, **_):
        (query,) = json.loads(body)["inputs"]
        if len(query["sequence"]) == 249:
            message = "sequence 1 has 249 residues; at most 240 are accepted"
            facts = {"OriginalStatusCode": self.status, "OriginalMessage": message, "Error": {"Code": "ModelError"}}
            raise ClientError(facts, "InvokeEndpoint")
        answer = {"name": query["name"], "label": "no", "score": 0.75, "probabilities": {}}
        return SimpleNamespace(body=io.BytesIO(json.dumps([answer]).encode()))


def test_a_protein_that_is_too_long_is_a_row_and_a_failure_of_the_endpoint_is_an_error(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import deploy as script

    longest, *others = KNOWN_PROTEINS
    refused = (longest, "refused: sequence 1 has 249 residues; at most 240 are accepted", "")
    assert script.ask(Endpoint(400)) == [refused, *((name, "no", "0.75") for name in others)]
    with pytest.raises(ClientError):
        script.ask(Endpoint(500))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--instances", "0", "'0': expected a whole number, at least 1"),
        ("--concurrency", "201", "'201': expected a whole number from 1 to 200"),
        ("--memory-mb", "1000", "invalid choice: 1000"),
        ("--timeout", "-1", "'-1': expected a whole number, at least 1"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_usage(monkeypatch, capsys, option, value, message):
    monkeypatch.syspath_prepend(SCRIPTS)
    import deploy as script

    with pytest.raises(SystemExit):
        script.parse_arguments(["--job", "job", "--endpoint", "name", "--role", ROLE, option, value])
    assert f"argument {option}: {message}" in capsys.readouterr().err


def test_the_limits_of_a_serverless_endpoint_are_those_of_sagemaker(aws, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import deploy as script

    shape = aws.client("sagemaker").meta.service_model.shape_for("ProductionVariantServerlessConfig")
    for option, member in (("--memory-mb", "MemorySizeInMB"), ("--concurrency", "MaxConcurrency")):
        limits = shape.members[member].metadata
        assert set(limits) == {"min", "max"}
        for limit in limits.values():
            given = ["--job", "job", "--endpoint", "name", "--role", ROLE, "--serverless", option, str(limit)]
            assert limit in vars(script.parse_arguments(given)).values()


def test_the_rest_of_an_incomplete_endpoint_is_deleted(aws, job):
    assert deploy(aws, "half", "--serverless").returncode == 0
    aws.client("sagemaker").delete_endpoint(EndpointName="half")
    # A new endpoint must not use the old model.
    again = deploy(aws, "half", "--serverless")
    assert again.returncode == 1
    assert "endpoint config and model named half exist already" in again.stderr
    done = aws.run("cleanup.py", "--endpoint", "half", "--yes")
    assert done.stdout == "deleted endpoint config half\ndeleted model half\n"


def test_nothing_is_deleted_if_the_endpoint_is_foreign(aws):
    aws.client("sagemaker").create_model(
        ModelName="theirs",
        ExecutionRoleArn=ROLE,
        PrimaryContainer={"Image": "i"},
        Tags=[{"Key": "created-by", "Value": "x"}],
    )
    aws.client("s3").put_object(Bucket=BUCKET, Key="ours/created-by-esm-efficient.json", Body=b"{}")
    done = aws.run("cleanup.py", "--endpoint", "theirs", "--place", f"s3://{BUCKET}/ours", "--yes")
    assert done.returncode == 1
    assert "was not created by these scripts" in done.stderr
    assert exists(aws, "model", "theirs")
    assert aws.keys("ours")


def test_all_object_versions_of_a_place_are_deleted_and_nothing_outside_it(aws):
    s3 = aws.client("s3")
    s3.create_bucket(Bucket="versions")
    s3.put_bucket_versioning(Bucket="versions", VersioningConfiguration={"Status": "Enabled"})
    for name in ("created-by-esm-efficient.json", *(f"checkpoints/{i}" for i in range(1500)), "checkpoints/1"):
        s3.put_object(Bucket="versions", Key=f"place/{name}", Body=b"1")
    s3.delete_object(Bucket="versions", Key="place/checkpoints/2")
    s3.put_object(Bucket="versions", Key="place-of-others/data", Body=b"1")
    done = aws.run("cleanup.py", "--place", "s3://versions/place", "--yes")
    assert done.returncode == 0, done.stderr[-2000:]
    left = s3.list_object_versions(Bucket="versions")
    assert [item["Key"] for item in left["Versions"]] == ["place-of-others/data"]
    assert not left.get("DeleteMarkers")
    assert aws.run("cleanup.py", "--place", "s3://versions/place", "--yes").stdout == "there is nothing to delete\n"
    for place in ("s3://versions/place-of-others", "s3://versions/place-of"):
        done = aws.run("cleanup.py", "--place", place, "--yes")
        assert s3.list_objects_v2(Bucket="versions")["KeyCount"] == 1
    assert aws.run("cleanup.py", "--place", "s3://versions", "--yes").returncode == 1
    assert aws.run("cleanup.py", "--yes").returncode == 2


def versioned_bucket(aws, name):
    s3 = aws.client("s3")
    s3.create_bucket(Bucket=name)
    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    return s3


def test_a_marker_that_was_deleted_marks_nothing(aws):
    s3 = versioned_bucket(aws, "reused")
    s3.put_object(Bucket="reused", Key="place/created-by-esm-efficient.json", Body=b"{}")
    s3.delete_object(Bucket="reused", Key="place/created-by-esm-efficient.json")
    s3.put_object(Bucket="reused", Key="place/thesis.csv", Body=b"somebody else's")
    done = aws.run("cleanup.py", "--place", "s3://reused/place", "--yes")
    assert done.returncode == 1
    assert "has no created-by-esm-efficient.json, or it was deleted" in done.stderr
    left = s3.list_object_versions(Bucket="reused")
    assert len(left["Versions"]) == 2
    assert len(left["DeleteMarkers"]) == 1


def test_versions_from_before_the_marker_are_left(aws):
    s3 = versioned_bucket(aws, "before")
    s3.put_object(Bucket="before", Key="place/thesis.csv", Body=b"somebody else's")
    s3.delete_object(Bucket="before", Key="place/thesis.csv")
    time.sleep(1.1)  # S3 gives times in seconds
    s3.put_object(Bucket="before", Key="place/created-by-esm-efficient.json", Body=b"{}")
    s3.put_object(Bucket="before", Key="place/model/weights", Body=b"ours")
    done = aws.run("cleanup.py", "--place", "s3://before/place", "--yes")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 object version(s) below s3://before/place are older" in done.stdout
    left = s3.list_object_versions(Bucket="before")
    assert [item["Key"] for item in left["Versions"]] == ["place/thesis.csv"]
    assert [item["Key"] for item in left["DeleteMarkers"]] == ["place/thesis.csv"]


def test_a_failed_endpoint_is_reported_with_its_reason_and_the_way_to_delete_it(aws, job, monkeypatch):
    from moto.sagemaker.models import FakeEndpoint

    describe = FakeEndpoint.response_object.fget
    failed = {"EndpointStatus": "Failed", "FailureReason": "the container did not answer"}
    monkeypatch.setattr(FakeEndpoint, "response_object", property(lambda self: describe(self) | failed))
    done = deploy(aws, "failed", "--serverless")
    assert done.returncode == 1
    assert "endpoint failed is Failed (the container did not answer)" in done.stderr
    assert "cleanup.py --endpoint failed --region us-east-1 --yes" in done.stderr


def test_a_failed_job_has_no_model_to_deploy(aws, job, monkeypatch):
    from moto.sagemaker.models import FakeTrainingJob

    status = property(lambda self: "Failed", lambda self, value: None)
    monkeypatch.setattr(FakeTrainingJob, "training_job_status", status, raising=False)
    describe = FakeTrainingJob.response_object.fget
    monkeypatch.setattr(
        FakeTrainingJob, "response_object", property(lambda self: describe(self) | {"TrainingJobStatus": "Failed"})
    )
    done = aws.run("deploy.py", "--job", "job", "--endpoint", "none", "--role", ROLE)
    assert done.returncode == 1
    assert "job job has no model: its status is Failed" in done.stderr


def test_cleanup_removes_everything_and_the_caller_policy_is_sufficient(aws, place, job):
    """One call of cleanup.py must remove the endpoint and all objects of prepare_data.py and submit.py."""
    before = len(aws.operations)
    path = f"s3://{BUCKET}/path"
    assert aws.run("prepare_data.py", "--place", path, "--data", "demo", "--limit", 20).returncode == 0
    model = ("--model_id", "facebook/esm2_t6_8M_UR50D")
    assert aws.run("submit.py", "--place", path, "--role", ROLE, "--", *model).returncode == 0
    assert len(aws.keys("path/")) > 50
    assert deploy(aws, "path", "--serverless").returncode == 0
    others = set(aws.keys()) - set(aws.keys("path/"))
    done = aws.run("cleanup.py", "--place", path, "--endpoint", "path", "--yes")
    assert done.returncode == 0, done.stderr
    assert set(aws.keys()) == others
    used = set(aws.operations[before:])
    assert {"CreateTrainingJob", "CreateEndpoint", "DeleteModel"} <= used
    policy = policy_of("caller_policy.json")
    for operation in used:
        resource = f"arn:aws:sagemaker:us-east-1:123456789012:{kind_of(operation)}/name"
        assert permits(policy, f"sagemaker:{operation}", resource), operation


def policy_of(name):
    text = (SCRIPTS / name).read_text()
    given = {"BUCKET": BUCKET, "PREFIX": "work", "REGION": "us-east-1", "ACCOUNT": "123456789012"}
    for word, value in {**given, "role/ROLE": "role/sagemaker"}.items():
        text = text.replace(word, value)
    return json.loads(text)


def kind_of(operation):
    """Return the resource kind of a SageMaker operation, as in an ARN."""
    if operation in ("AddTags", "ListTags"):
        return "endpoint"
    kinds = [("TrainingJob", "training-job"), ("EndpointConfig", "endpoint-config"), ("Endpoint", "endpoint")]
    kinds.append(("Model", "model"))
    return next(kind for word, kind in kinds if operation.endswith(word))


def permits(policy, action, resource):
    """Return whether a policy allows an action, according to moto and without conditions."""
    statements = [{k: v for k, v in s.items() if k != "Condition"} for s in policy["Statement"]]
    document = json.dumps({"Version": policy["Version"], "Statement": statements})
    return IAMPolicy(document).is_action_permitted(action, resource) == PermissionResult.PERMITTED


OBJECT, LOGS = "arn:aws:s3:::{}/{}", "arn:aws:logs:us-east-1:123456789012:log-group:{}"
IMAGES = "arn:aws:ecr:us-east-1:763104351884:repository"
JOBS = "arn:aws:sagemaker:us-east-1:123456789012:training-job"


@pytest.mark.parametrize(
    ("name", "action", "resource", "allowed"),
    [
        ("role_policy.json", "s3:GetObject", OBJECT.format(BUCKET, "work/dataset/task.json"), True),
        ("role_policy.json", "s3:PutObject", OBJECT.format(BUCKET, "work/output/job/model.tar.gz"), True),
        ("role_policy.json", "s3:ListBucket", f"arn:aws:s3:::{BUCKET}", True),
        ("role_policy.json", "logs:PutLogEvents", LOGS.format("/aws/sagemaker/TrainingJobs:log-stream:x"), True),
        ("role_policy.json", "ecr:BatchGetImage", f"{IMAGES}/huggingface-pytorch-training", True),
        ("role_policy.json", "ecr:BatchGetImage", f"{IMAGES}/autogluon-training", False),
        ("role_policy.json", "s3:GetObject", OBJECT.format(BUCKET, "others/data"), False),
        ("role_policy.json", "s3:GetObject", OBJECT.format("other", "work/dataset"), False),
        ("role_policy.json", "s3:DeleteObject", OBJECT.format(BUCKET, "work/checkpoints/run/checkpoint-1/x"), True),
        ("role_policy.json", "s3:DeleteObject", OBJECT.format(BUCKET, "work/dataset/task.json"), False),
        ("role_policy.json", "logs:PutLogEvents", LOGS.format("/aws/lambda/x"), False),
        ("role_policy.json", "iam:PassRole", ROLE, False),
        ("role_policy.json", "sagemaker:CreateTrainingJob", f"{JOBS}/x", False),
        ("caller_policy.json", "sagemaker:CreateTrainingJob", f"{JOBS}/x", True),
        ("caller_policy.json", "s3:DeleteObjectVersion", OBJECT.format(BUCKET, "work/x"), True),
        ("caller_policy.json", "iam:PassRole", ROLE, True),
        ("caller_policy.json", "s3:DeleteObject", OBJECT.format(BUCKET, "others/x"), False),
        ("caller_policy.json", "s3:DeleteBucket", f"arn:aws:s3:::{BUCKET}", False),
        ("caller_policy.json", "iam:PassRole", "arn:aws:iam::123456789012:role/admin", False),
    ],
)  # fmt: skip
def test_the_policies_allow_only_what_is_needed(name, action, resource, allowed):
    assert permits(policy_of(name), action, resource) == allowed


def test_iam_accepts_the_policies(aws):
    iam = aws.client("iam")
    trust = policy_of("role_trust.json")
    assert trust["Statement"][0]["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    iam.create_role(RoleName="sagemaker", AssumeRolePolicyDocument=json.dumps(trust))
    for name in ("role_policy.json", "caller_policy.json", "tracking_policy.json"):
        policy = policy_of(name)
        iam.put_role_policy(RoleName="sagemaker", PolicyName=name, PolicyDocument=json.dumps(policy))
        assert not [s for s in policy["Statement"] if "*" in s["Action"] or s["Action"] == "*"]
    # These two statements cannot be narrowed by a resource, so they need a condition.
    (metrics,) = [s for s in policy_of("role_policy.json")["Statement"] if s["Sid"] == "WriteMetrics"]
    assert metrics["Condition"]["StringLike"]["cloudwatch:namespace"]
    (listing,) = [s for s in policy_of("role_policy.json")["Statement"] if s["Sid"] == "ListThePlace"]
    assert listing["Condition"]["StringLike"]["s3:prefix"] == ["work/*"]


@pytest.mark.parametrize(
    "options",
    [
        ("--memory-mb", "4096"),
        ("--concurrency", "2"),
        ("--serverless", "--instances", "2"),
        ("--serverless", "--instance-type", GPU),
    ],
    ids=" ".join,
)
def test_an_option_of_the_other_kind_of_endpoint_is_refused(monkeypatch, capsys, options):
    monkeypatch.syspath_prepend(SCRIPTS)
    import deploy as script

    with pytest.raises(SystemExit):
        script.parse_arguments(["--job", "job", "--endpoint", "name", "--role", ROLE, *options])
    kind = "real-time" if "--serverless" in options else "serverless"
    assert f"is for a {kind} endpoint" in capsys.readouterr().err
