"""Delete what these scripts have made: an endpoint with its configuration and model, and a place in S3.

    python examples/sagemaker/cleanup.py --endpoint esm2-membrane --place s3://BUCKET/esm2-membrane --yes

Without ``--yes`` it says what it would delete. What is gone already is no error. What these scripts did not make, by
the tags of an endpoint and the mark in a place, is refused, and nothing is deleted then.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from aws import MARKER, TAGS, Place, client, run
from botocore.exceptions import ClientError

from esm_efficient import ConfigurationError

KINDS = ("endpoint", "endpoint_config", "model")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", help="name of the endpoint")
    parser.add_argument("--place", help="s3://bucket/prefix that was given to the other scripts")
    parser.add_argument("--region", help="default: the configured one")
    parser.add_argument("--yes", action="store_true", help="delete; without it nothing is")
    options = parser.parse_args(arguments)
    if not options.endpoint and not options.place:
        parser.error("give --endpoint, --place or both")
    return options


def name_of(kind: str) -> str:
    """As SageMaker's API has it: ``EndpointConfig``."""
    return "".join(part.title() for part in kind.split("_"))


def words_of(kind: str) -> str:
    return kind.replace("_", " ")


def describe(sagemaker: Any, kind: str, name: str) -> dict[str, Any] | None:
    """An endpoint, a configuration or a model; None if there is none of that name."""
    try:
        return getattr(sagemaker, f"describe_{kind}")(**{f"{name_of(kind)}Name": name})
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("ValidationException", "ResourceNotFound"):
            raise
        return None


def find_endpoint(sagemaker: Any, name: str) -> list[tuple[str, Callable[[], Any]]]:
    """What is left of an endpoint, in the order in which it goes; all three have its name."""
    found = []
    for kind in KINDS:
        word, words = name_of(kind), words_of(kind)
        record = describe(sagemaker, kind, name)
        if record is None:
            continue
        pages = sagemaker.get_paginator("list_tags").paginate(ResourceArn=record[f"{word}Arn"])
        tags = {tag["Key"]: tag["Value"] for page in pages for tag in page["Tags"]}
        if not TAGS.items() <= tags.items():
            raise ConfigurationError(f"the {words} {name} was not made by these scripts: it is not tagged so")
        delete = getattr(sagemaker, f"delete_{kind}")
        found.append((f"{words} {name}", lambda d=delete, w=word: d(**{f"{w}Name": name})))
    return found


def find_objects(s3: Any, place: Place) -> list[dict[str, str]]:
    """Every version of every object of a place, the mark last, so that what is cut off can be gone on with."""
    pages = s3.get_paginator("list_object_versions").paginate(Bucket=place.bucket, Prefix=f"{place.prefix}/")
    found = [
        {"Key": item["Key"], "VersionId": item["VersionId"]}
        for page in pages
        for item in (*page.get("Versions", ()), *page.get("DeleteMarkers", ()))
    ]
    mark = place.key(MARKER)
    if found and not any(item["Key"] == mark for item in found):
        raise ConfigurationError(
            f"{place.uri()} has no {MARKER}, so these scripts did not make it, and do not delete its {len(found)} "
            "object(s)"
        )
    return sorted(found, key=lambda item: item["Key"] == mark)


def delete_objects(s3: Any, place: Place, objects: list[dict[str, str]]) -> None:
    for start in range(0, len(objects), 1000):
        part = objects[start : start + 1000]
        answer = s3.delete_objects(Bucket=place.bucket, Delete={"Objects": part, "Quiet": True})
        if errors := answer.get("Errors"):
            raise ConfigurationError(f"{len(errors)} object(s) could not be deleted: {errors[0]}")


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    steps: list[tuple[str, Callable[[], Any]]] = []
    if options.endpoint:
        sagemaker = client("sagemaker", options.region)
        steps += find_endpoint(sagemaker, options.endpoint)
    if options.place:
        s3, place = client("s3", options.region), Place.parse(options.place)
        if objects := find_objects(s3, place):
            steps.append((f"{len(objects)} object(s) below {place.uri()}", lambda: delete_objects(s3, place, objects)))
    if not steps:
        print("nothing is left to delete")
        return
    if not options.yes:
        raise SystemExit("\n".join(["with --yes this deletes:", *(f"  {name}" for name, _ in steps)]))
    for name, delete in steps:
        delete()
        print(f"deleted {name}")


if __name__ == "__main__":
    run(main)
