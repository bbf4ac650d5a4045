"""What these scripts share: places in S3 that are theirs, container images, and requests that are not sent."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from packaging.requirements import Requirement
from packaging.version import Version

from esm_efficient import ConfigurationError, EsmEfficientError

if TYPE_CHECKING:
    from sagemaker.core.helper.session_helper import Session

MARKER = "created-by-esm-efficient.json"
TAGS = {"created-by": "esm-efficient"}
# The SDK asks IAM whether a role may do what AWS's broadest policy allows, and refuses one that may do less.
os.environ.setdefault("SAGEMAKER_VALIDATE_ROLE", "false")

QUIET = {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}}


@dataclass(frozen=True)
class Place:
    """A prefix of a bucket."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> Place:
        """From ``s3://bucket/prefix``; a whole bucket is refused."""
        parts = urlparse(uri)
        prefix = parts.path.strip("/")
        if parts.scheme != "s3" or not parts.netloc or not prefix or parts.query or parts.fragment:
            raise ConfigurationError(f"{uri!r}: expected s3://bucket/prefix")
        return cls(parts.netloc, prefix)

    def key(self, *names: str) -> str:
        return "/".join((self.prefix, *names))

    def uri(self, *names: str) -> str:
        return f"s3://{self.bucket}/{self.key(*names)}"


def run(main: Callable[[], object]) -> None:
    """Run a script; what the user can mend is one line instead of a traceback."""
    try:
        main()
    except (EsmEfficientError, BotoCoreError, ClientError) as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        # A job that failed, a role that is refused: the SDK has a class for each, and their messages say it.
        if not type(error).__module__.startswith("sagemaker."):
            raise
        sys.exit(f"error: {error}")


def client(service: str, region: str | None = None) -> Any:
    return boto3.client(service, region_name=region)


def keys(s3: Any, place: Place) -> list[str]:
    """Every object below a prefix."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=place.bucket, Prefix=f"{place.prefix}/")
    return [item["Key"] for page in pages for item in page.get("Contents", ())]


def is_ours(s3: Any, place: Place) -> bool:
    """Whether these scripts have marked a prefix as theirs."""
    try:
        s3.head_object(Bucket=place.bucket, Key=place.key(MARKER))
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchKey", "NotFound"):
            raise
        return False
    return True


def claim(s3: Any, place: Place) -> None:
    """Mark a prefix as ours, so that cleanup.py may empty it; one that holds other people's objects is refused."""
    if is_ours(s3, place):
        return
    if found := keys(s3, place):
        raise ConfigurationError(
            f"{place.uri()} holds {len(found)} object(s) that these scripts did not put there, such as {found[0]}: "
            "choose another prefix"
        )
    body = json.dumps({"note": "cleanup.py deletes everything below this prefix"})
    s3.put_object(Bucket=place.bucket, Key=place.key(MARKER), Body=body.encode())


def tags(extra: Mapping[str, str] | None = None) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in {**TAGS, **(extra or {})}.items()]


@dataclass(frozen=True)
class Image:
    """A Hugging Face container image, and what is installed in it."""

    uri: str
    transformers: str
    torch: str


def find_image(scope: str, region: str, instance_type: str) -> Image:
    """The newest image that the SDK knows and the library supports, for ``training`` or ``inference``."""
    from sagemaker.core import image_uris

    versions = image_uris.config_for_framework("huggingface")[scope]["versions"]
    found = []
    for transformers, bases in versions.items():
        for base, details in bases.items():
            if base.startswith("pytorch"):
                found.append((Version(transformers), Version(base.removeprefix("pytorch")), details["py_versions"]))
    wanted = library_requirements()
    fitting = [
        image for image in found if wanted["transformers"].contains(image[0]) and wanted["torch"].contains(image[1])
    ]
    if not fitting:
        newest = max(found)
        raise ConfigurationError(
            f"the SDK's newest {scope} image has transformers {newest[0]} and torch {newest[1]}; the library wants "
            f"transformers{wanted['transformers']} and torch{wanted['torch']}: pip install --upgrade sagemaker, or "
            "give an image of your own with --image"
        )
    transformers, torch, pythons = max(fitting)
    uri = image_uris.retrieve(
        framework="huggingface",
        region=region,
        version=str(transformers),
        base_framework_version=f"pytorch{torch}",
        py_version=pythons[-1],
        instance_type=instance_type,
        image_scope=scope,
    )
    return Image(uri, str(transformers), str(torch))


def library_requirements() -> dict[str, Any]:
    """The versions that the installed library supports, by the name of what it needs."""
    found = map(Requirement, importlib.metadata.requires("esm-efficient-finetuning") or ())
    return {requirement.name: requirement.specifier for requirement in found if requirement.marker is None}


class Unsent(Exception):
    """A request that was made and not sent."""

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__("not sent")
        self.request = request


def dry_session(region: str, bucket: str, operation: str) -> Session:
    """A session that reaches no network: uploads come to nothing, and one operation of SageMaker raises `Unsent`."""
    from sagemaker.core.helper.session_helper import Session

    boto_session = boto3.Session(aws_access_key_id="dry", aws_secret_access_key="run", region_name=region)
    events = boto_session.events

    answers = {
        "Account": "0" * 12,
        "Arn": f"arn:aws:iam::{'0' * 12}:user/dry-run",
        "Buckets": [{"Name": bucket, "CreationDate": datetime.now(timezone.utc)}],
        "ETag": '""',
    }

    def answer(model: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        class Response:
            status_code, headers = 200, {}

        return Response(), answers

    def capture(params: dict[str, Any], **kwargs: Any) -> None:
        raise Unsent(params)

    events.register("before-call", answer)
    events.register(f"provide-client-params.sagemaker.{operation}", capture)
    return Session(boto_session=boto_session, default_bucket=bucket, sagemaker_config=QUIET)
