"""A real S3 endpoint on this machine: moto's server, in a process of its own; nothing but loopback is asked."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roentgen.serving.local_server import free_port

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "roentgen"


@contextmanager
def s3_endpoint(log: Path, host: str = "127.0.0.1") -> Iterator[str]:
    """Run a server with one bucket, `BUCKET`; yields its address, for AWS_ENDPOINT_URL."""
    port = free_port(host)
    address = f"http://{host}:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | ENVIRONMENT)
        try:
            _wait(address, server, log)
            request = urllib.request.Request(f"{address}/{BUCKET}", method="PUT")
            urllib.request.urlopen(request, timeout=10).close()
            yield address
        finally:
            server.kill()
            server.wait()


def lock(address: str) -> dict[str, str]:
    """Make a server answer only requests that are signed with the keys which this returns, as AWS does."""
    import boto3

    iam = boto3.client("iam", "us-east-1", endpoint_url=address, aws_access_key_id="-", aws_secret_access_key="-")
    iam.create_user(UserName="owner")
    key = iam.create_access_key(UserName="owner")["AccessKey"]
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    iam.put_user_policy(UserName="owner", PolicyName="all", PolicyDocument=json.dumps(policy))
    allowed_unsigned = urllib.request.Request(
        f"{address}/moto-api/reset-auth", b"0", {"Content-Type": "application/octet-stream"}
    )
    urllib.request.urlopen(allowed_unsigned, timeout=10).close()
    return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


def _wait(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except OSError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"moto's server does not answer: {log.read_text()}") from error
            time.sleep(0.1)
