"""Shared by these scripts: prefixes in S3, container images, and a session for dry runs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
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
# By default the SDK refuses a role that allows less than AWS's broadest SageMaker policy.
os.environ.setdefault("SAGEMAKER_VALIDATE_ROLE", "false")

QUIET = {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}}


@dataclass(frozen=True)
class Place:
    """A prefix of a bucket, below which these scripts store everything of one model."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> Place:
        """Parse ``s3://bucket/prefix``; a bucket without a prefix is an error."""
        parts = urlparse(uri)
        prefix = parts.path.strip("/")
        if parts.scheme != "s3" or not parts.netloc or not prefix or parts.query or parts.fragment:
            raise ConfigurationError(f"got the S3 place {uri!r}: expected s3://bucket/prefix")
        return cls(parts.netloc, prefix)

    def key(self, *names: str) -> str:
        return "/".join((self.prefix, *names))

    def uri(self, *names: str) -> str:
        return f"s3://{self.bucket}/{self.key(*names)}"


def run(main: Callable[[], object]) -> None:
    """Run a script; print an error that the user can correct as one line, without a traceback."""
    try:
        main()
    except (EsmEfficientError, BotoCoreError, ClientError) as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # the SDK has error classes of its own for failed jobs, refused roles and the like
        if not type(error).__module__.startswith("sagemaker."):
            raise
        sys.exit(f"error: {error}")


def region_of(given: str | None) -> str:
    """Return the region that was given, or the configured one.

    Raises:
        ConfigurationError: there is none, or it is no region.
    """
    region = given or boto3.Session().region_name
    if not region:
        raise ConfigurationError("no AWS region is configured: give --region")
    if not re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d+", region):
        raise ConfigurationError(f"the AWS region is {region!r}: expected one such as us-east-1; give --region")
    return region


def check_role(role: str) -> None:
    """Refuse a role that is not given by its ARN, which the SDK would look for on the network.

    Raises:
        ConfigurationError: it is not.
    """
    if not re.fullmatch(r"arn:aws[a-z-]*:iam::\d{12}:role/.+", role):
        example = "arn:aws:iam::123456789012:role/NAME"
        raise ConfigurationError(f"--role {role!r}: expected the ARN of a role, such as {example}")


def client(service: str, region: str | None = None) -> Any:
    return boto3.client(service, region_name=region)


def keys(s3: Any, place: Place) -> list[str]:
    """List the keys of all objects below a prefix."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=place.bucket, Prefix=f"{place.prefix}/")
    return [item["Key"] for page in pages for item in page.get("Contents", ())]


def is_ours(s3: Any, place: Place) -> bool:
    """Return whether these scripts created a prefix, which their marker object shows."""
    try:
        s3.head_object(Bucket=place.bucket, Key=place.key(MARKER))
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchKey", "NotFound"):
            raise
        return False
    return True


def claim(s3: Any, place: Place) -> None:
    """Put the marker into a prefix, so that cleanup.py may empty it.

    Raises:
        ConfigurationError: the prefix contains objects and no marker.
    """
    if is_ours(s3, place):
        return
    if existing := keys(s3, place):
        raise ConfigurationError(
            f"{place.uri()} contains {len(existing)} object(s) that these scripts did not create, such as "
            f"{existing[0]}: choose another prefix"
        )
    body = json.dumps({"note": "cleanup.py deletes everything below this prefix"})
    s3.put_object(Bucket=place.bucket, Key=place.key(MARKER), Body=body.encode())


def tags(extra: Mapping[str, str] | None = None) -> list[dict[str, str]]:
    """Return the tags of everything that these scripts create, as boto3 takes them."""
    return [{"Key": key, "Value": value} for key, value in {**TAGS, **(extra or {})}.items()]


@dataclass(frozen=True)
class Image:
    """A Hugging Face container image, and the library versions in it."""

    uri: str
    transformers: str
    torch: str


def find_image(scope: str, region: str, instance_type: str) -> Image:
    """Find the newest image that the SDK lists and the library supports, for ``training`` or ``inference``."""
    from sagemaker.core import image_uris

    versions = image_uris.config_for_framework("huggingface")[scope]["versions"]
    images = []
    for transformers, bases in versions.items():
        for base, details in bases.items():
            if base.startswith("pytorch"):
                images.append((Version(transformers), Version(base.removeprefix("pytorch")), details["py_versions"]))
    required = library_requirements()
    supported = [
        image
        for image in images
        if required["transformers"].contains(image[0]) and required["torch"].contains(image[1])
    ]
    if not supported:
        newest = max(images)
        raise ConfigurationError(
            f"the SDK's newest {scope} image has transformers {newest[0]} and torch {newest[1]}, but the library needs "
            f"transformers{required['transformers']} and torch{required['torch']}: run pip install --upgrade "
            "sagemaker, or give your own image with --image"
        )
    transformers, torch, pythons = max(supported)
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
    """Return the version ranges that the installed library supports, by the name of the requirement."""
    requirements = map(Requirement, importlib.metadata.requires("esm-efficient-finetuning") or ())
    return {requirement.name: requirement.specifier for requirement in requirements if requirement.marker is None}


class Unsent(Exception):
    """Carries a request that was built but not sent."""

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__("not sent")
        self.request = request


def dry_session(region: str, bucket: str, operation: str) -> Session:
    """Make a session without a network: uploads do nothing, and one SageMaker operation raises `Unsent`."""
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
