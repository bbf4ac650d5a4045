"""Delete what these scripts created: an endpoint with its configuration and model, and a place in S3.

    python examples/sagemaker/cleanup.py --endpoint esm2-membrane --place s3://BUCKET/esm2-membrane --yes

Without ``--yes`` the script lists what it would delete. It skips what no longer exists. An endpoint of which nothing is
found is an error at the end, because it may be in another region, and billed. If the tags of an endpoint or the marker
of a place are missing, these scripts did not create it: the script reports an error and deletes nothing. In a bucket
with versions, the marker must be the current version, and versions older than the marker stay.
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
    parser.add_argument("--place", help="s3://bucket/prefix, as given to the other scripts")
    parser.add_argument("--region", help="default: the configured one")
    parser.add_argument("--yes", action="store_true", help="delete; without it, list what would be deleted")
    options = parser.parse_args(arguments)
    if not options.endpoint and not options.place:
        parser.error("give --endpoint, --place or both")
    return options


def name_of(kind: str) -> str:
    """Return a kind as SageMaker's API spells it: ``EndpointConfig`` for ``endpoint_config``."""
    return "".join(part.title() for part in kind.split("_"))


def words_of(kind: str) -> str:
    return kind.replace("_", " ")


def describe(sagemaker: Any, kind: str, name: str) -> dict[str, Any] | None:
    """Describe an endpoint, a configuration or a model; None if none has that name."""
    try:
        return getattr(sagemaker, f"describe_{kind}")(**{f"{name_of(kind)}Name": name})
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("ValidationException", "ResourceNotFound"):
            raise
        return None


def find_endpoint(sagemaker: Any, name: str) -> list[tuple[str, Callable[[], Any]]]:
    """Find the endpoint, its configuration and its model, which all have the same name.

    Returns:
        A description and a delete function of each that exists, in the order of deletion.
    """
    steps = []
    for kind in KINDS:
        word, words = name_of(kind), words_of(kind)
        record = describe(sagemaker, kind, name)
        if record is None:
            continue
        pages = sagemaker.get_paginator("list_tags").paginate(ResourceArn=record[f"{word}Arn"])
        tags = {tag["Key"]: tag["Value"] for page in pages for tag in page["Tags"]}
        if not TAGS.items() <= tags.items():
            raise ConfigurationError(
                f"the {words} {name} was not created by these scripts: it lacks the tag created-by=esm-efficient"
            )
        delete = getattr(sagemaker, f"delete_{kind}")
        steps.append((f"{words} {name}", lambda d=delete, w=word: d(**{f"{w}Name": name})))
    return steps


def find_objects(s3: Any, place: Place) -> tuple[list[dict[str, str]], int]:
    """List all versions of all objects that were written to a place since it was marked.

    In a bucket with versions, a deleted marker is still listed, and so are the objects of an earlier owner. So the
    marker must be the current version, and what is older than the marker is left.

    Returns:
        The versions to delete, with the current marker last, so that an interrupted deletion can continue; and the
        number of versions that are left because they are older than the marker.
    """
    pages = list(s3.get_paginator("list_object_versions").paginate(Bucket=place.bucket, Prefix=f"{place.prefix}/"))
    markers = place.key(MARKER)
    versions = [item for page in pages for item in page.get("Versions", ())]
    everything = versions + [item for page in pages for item in page.get("DeleteMarkers", ())]
    current = next((item for item in versions if item["Key"] == markers and item["IsLatest"]), None)
    if current is None:
        if everything:
            raise ConfigurationError(
                f"{place.uri()} has no {MARKER}, or it was deleted, so these scripts did not create what is there now. "
                f"They do not delete its {len(everything)} object(s)"
            )
        return [], 0
    ours = [item for item in everything if item["Key"] == markers or item["LastModified"] >= current["LastModified"]]
    ours.sort(key=lambda item: (item["Key"] == markers, item is current))
    return [{"Key": item["Key"], "VersionId": item["VersionId"]} for item in ours], len(everything) - len(ours)


def delete_objects(s3: Any, place: Place, objects: list[dict[str, str]]) -> None:
    for start in range(0, len(objects), 1000):
        part = objects[start : start + 1000]
        answer = s3.delete_objects(Bucket=place.bucket, Delete={"Objects": part, "Quiet": True})
        if errors := answer.get("Errors"):
            raise ConfigurationError(f"{len(errors)} object(s) could not be deleted: {errors[0]}")


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    steps: list[tuple[str, Callable[[], Any]]] = []
    missing = ""
    if options.endpoint:
        sagemaker = client("sagemaker", options.region)
        found = find_endpoint(sagemaker, options.endpoint)
        if not found:  # it may be elsewhere, and billed
            missing = f"nothing is named {options.endpoint} in {sagemaker.meta.region_name}: is --region another one?"
        steps += found
    if options.place:
        s3, place = client("s3", options.region), Place.parse(options.place)
        objects, older = find_objects(s3, place)
        if older:
            print(f"{older} object version(s) below {place.uri()} are older than {MARKER} and are left")
        if objects:
            steps.append((f"{len(objects)} object(s) below {place.uri()}", lambda: delete_objects(s3, place, objects)))
    if not steps and not missing:
        print("there is nothing to delete")
        return
    if steps and not options.yes:
        lines = [*([missing] if missing else []), "with --yes this deletes:", *(f"  {name}" for name, _ in steps)]
        raise SystemExit("\n".join(lines))
    for name, delete in steps:
        delete()
        print(f"deleted {name}")
    if missing:
        raise SystemExit(missing)


if __name__ == "__main__":
    run(main)
