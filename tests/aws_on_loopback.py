"""S3 and SageMaker on loopback (moto's server), and a training container without Docker (AWS's own driver)."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from copies import ServedCopy

boto3 = pytest.importorskip("boto3", reason="the extra sagemaker-test is not installed")
pytest.importorskip("moto", reason="the extra sagemaker-test is not installed")
pytest.importorskip("sagemaker.train", reason="the extra sagemaker-test is not installed")

SCRIPTS = Path(__file__).resolve().parents[1] / "examples" / "sagemaker"
ROLE = "arn:aws:iam::123456789012:role/sagemaker"
BUCKET = "proteins"
DRIVER = ("sm_train.sh", "common/utils.py", "scripts/environment.py")


def without_empty(describe):
    """Remove the empty dicts of moto's response. AWS omits these fields, and the SDK cannot read them."""
    from moto.core.responses import ActionResult

    @functools.wraps(describe)
    def wrapped(self):
        result = describe(self)._result
        return ActionResult({k: v for k, v in result.items() if v or k not in ("VpcConfig", "DataCaptureConfig")})

    return wrapped


class Aws:
    """moto's server in this process, with a record of its requests."""

    def __init__(self, folder: Path) -> None:
        from moto.sagemaker.responses import SageMakerResponse
        from moto.server import ThreadedMotoServer

        self.requests: list[tuple[str, dict]] = []
        self.operations: list[str] = []
        call_action = SageMakerResponse.call_action

        def recorded_action(response):
            self.operations.append(response._get_action())
            return call_action(response)

        SageMakerResponse.call_action = recorded_action
        for name in ("describe_model", "describe_endpoint", "describe_endpoint_config"):
            setattr(SageMakerResponse, name, without_empty(getattr(SageMakerResponse, name)))
        for name in ("create_training_job", "create_model", "create_endpoint_config", "create_endpoint"):
            setattr(SageMakerResponse, name, self.recorded(name, getattr(SageMakerResponse, name)))
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server.start()
        self.address = "http://{}:{}".format(*self.server.get_host_and_port())
        config = folder / "config.yaml"
        config.write_text(
            json.dumps({"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}})
        )
        self.environment = {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "SAGEMAKER_USER_CONFIG_OVERRIDE": str(config),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def recorded(self, name, handler):
        @functools.wraps(handler)
        def wrapped(response):
            self.requests.append((name, json.loads(response.body)))
            return handler(response)

        return wrapped

    def sent(self, name: str) -> dict:
        """Return the latest request of a kind."""
        return [request for kind, request in self.requests if kind == name][-1]

    def client(self, service: str):
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        return boto3.client(service, endpoint_url=self.address, **keys)

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def download(self, prefix: str, folder: Path) -> Path:
        for key in self.keys(prefix):
            path = folder / key.removeprefix(prefix).lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.client("s3").download_file(BUCKET, key, str(path))
        return folder

    def upload(self, folder: Path, prefix: str) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.client("s3").upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}")

    def run(self, script: str, *arguments, **environment) -> subprocess.CompletedProcess:
        """Run a script as a user would."""
        with tempfile.TemporaryDirectory() as folder:
            changed = self.environment | environment
            return ServedCopy(SCRIPTS / script, *arguments, folder=Path(folder), environment=changed).wait()


class Container:
    """A folder with the layout of /opt/ml, in which AWS's own driver runs.

    Args:
        root: the folder.
        aws: the server that received the job.
        request: the body of CreateTrainingJob.
        with_dependencies: whether the driver's pip also checks what the requirements require, which takes long.
    """

    def __init__(self, root: Path, aws: Aws, request: dict, *, with_dependencies: bool = False) -> None:
        self.root = root
        self.command = [part.replace("/opt/ml", str(root)) for part in self._entry(request)]
        config = root / "input" / "config"
        config.mkdir(parents=True)
        for channel in request["InputDataConfig"]:
            uri = channel["DataSource"]["S3DataSource"]["S3Uri"]
            aws.download(uri.removeprefix(f"s3://{BUCKET}/"), root / "input" / "data" / channel["ChannelName"])
        for name in DRIVER:
            path = root / "input" / "data" / "sm_drivers" / name
            path.write_text(path.read_text().replace("/opt/ml", str(root)))
        for name in ("model", "output/data", "checkpoints"):
            (root / name).mkdir(parents=True)
        (config / "hyperparameters.json").write_text(json.dumps(request["HyperParameters"]))
        channels = {channel["ChannelName"]: {"TrainingInputMode": "File"} for channel in request["InputDataConfig"]}
        (config / "inputdataconfig.json").write_text(json.dumps(channels))
        (config / "resourceconfig.json").write_text(
            json.dumps(
                {
                    "current_host": "localhost",
                    "current_instance_type": request["ResourceConfig"]["InstanceType"],
                    "hosts": ["localhost"],
                    "network_interface_name": "lo",
                }
            )
        )
        self.environment = request.get("Environment", {}) | {"TRAINING_JOB_NAME": request["TrainingJobName"]}
        if not with_dependencies:
            self.environment["PIP_NO_DEPS"] = "1"

    @staticmethod
    def _entry(request: dict) -> list[str]:
        algorithm = request["AlgorithmSpecification"]
        return [*algorithm["ContainerEntrypoint"], *algorithm["ContainerArguments"]]

    def start(self) -> subprocess.Popen:
        environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        options = {"env": os.environ | environment | self.environment, "start_new_session": True}
        with open(self.root / "log.txt", "a") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, **options)

    def run(self) -> int:
        return self.start().wait(timeout=240)

    def interrupt(self, *, after: int) -> int:
        """Start the job, wait for a checkpoint at step `after` or later, and send SIGTERM.

        It goes to the process that the driver started, train.py or torchrun.
        """
        process = self.start()
        end = time.monotonic() + 200
        while not any(step >= after for step in self.checkpoints()):
            assert process.poll() is None, self.log()[-3000:]
            assert time.monotonic() < end, self.log()[-3000:]
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        next(p for p in family if any("train.py" in word for word in p.cmdline())).send_signal(signal.SIGTERM)
        return process.wait(timeout=100)

    def checkpoints(self) -> list[int]:
        """Return the steps of the complete checkpoints."""
        files = (self.root / "checkpoints").glob("checkpoint-*/files.json")
        return sorted(int(path.parent.name.split("-")[1]) for path in files)

    def log(self) -> str:
        return re.sub(r"\r[^\n]*", "", (self.root / "log.txt").read_text())
