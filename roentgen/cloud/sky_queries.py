"""Queries SkyPilot's Python API. It runs in SkyPilot's environment, so it imports nothing from this project.

    python sky_queries.py where CLUSTER           -> {"provider": "aws", "name": …, "name_on_cloud": …, "config": {…}}
    python sky_queries.py instances WHERE         -> ["i-0123…"], instances that are not terminated

`sky down` returns and forgets the instances once the provider has accepted their termination; this queries the provider.
"""

import json
import sys
from typing import Any


def where(name: str) -> dict[str, Any]:
    """Return the arguments for querying a cluster's provider."""
    from sky import global_user_state

    handle = global_user_state.get_handle_from_cluster_name(name)
    config = global_user_state.get_cluster_yaml_dict(handle.cluster_yaml)["provider"]
    provider = str(handle.launched_resources.cloud).lower()
    return {"provider": provider, "name": name, "name_on_cloud": handle.cluster_name_on_cloud, "config": config}


def instances(of: dict[str, Any]) -> list[str]:
    """Return the ids of the instances that are not terminated."""
    from sky import provision

    found = provision.query_instances(
        of["provider"], of["name"], of["name_on_cloud"], of["config"], non_terminated_only=of["provider"] != "aws"
    )
    return _not_ended_on_aws(list(found), of["config"]["region"]) if of["provider"] == "aws" else list(found)


def _not_ended_on_aws(ids: list[str], region: str) -> list[str]:
    """Query EC2, because SkyPilot counts an instance that is shutting down as terminated."""
    from sky.adaptors import aws

    if not ids:
        return []
    reservations = aws.client("ec2", region_name=region).describe_instances(InstanceIds=ids)["Reservations"]
    described = [instance for reservation in reservations for instance in reservation["Instances"]]
    return [one["InstanceId"] for one in described if one["State"]["Name"] != "terminated"]


if __name__ == "__main__":
    verb, argument = sys.argv[1:]
    print(json.dumps(where(argument) if verb == "where" else instances(json.loads(argument))))
