"""An EC2 without a cloud: moto answers its API, and every instance that moto says is running becomes a host on this machine.

A host has network, mount, process, host-name and IPC namespaces of its own, the addresses that moto gave the instance, the ssh
key from its user data, and a real sshd; ending the instance in moto kills it. With this a real `sky launch` runs from end to
end.

A host's "machine image" is what this machine has: Debian, a user `ubuntu`, SkyPilot's runtime (`image.sh`), and this project's
virtual environment, laid over so that each host may write to it. Needs root, openssh-server, iproute2, iptables, rsync, sudo.

Runs in SkyPilot's environment, which has boto3, until it is asked to end; then nothing of it is left:

    python fake_ec2.py ENDPOINT FOLDER VENV BASE     with the project's virtual environment and its interpreter's folder
"""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BRIDGE = "br-ec2"
GATEWAY = "172.30.255.1"
ROLE = "skypilot-v1"
NEEDED = ("ip", "iptables", "rsync", "sudo", "nsenter", "unshare")

INIT = """
set -e
mount --make-rprivate /
laid_over() {{  # this machine's folder $1 at $2, written to only in this host's own $3
  mkdir -p {folder}/$3/up {folder}/$3/work
  mount -t overlay overlay -o lowerdir=$1,upperdir={folder}/$3/up,workdir={folder}/$3/work $2
}}
mount -t tmpfs tmpfs /mnt
mkdir /mnt/base /mnt/venv
mount --bind {base} /mnt/base
laid_over {venv} /mnt/venv venv
chown -R ubuntu:ubuntu {folder}/venv/up
laid_over /home/ubuntu /home/ubuntu home
chown ubuntu:ubuntu {folder}/home/up
laid_over /etc /etc etc
mkdir -p /home/ubuntu/.ssh /home/ubuntu/sky_workdir
cp {folder}/keys /home/ubuntu/.ssh/authorized_keys
ln -sfn {venv} /home/ubuntu/sky_workdir/.venv
chown -R ubuntu:ubuntu /home/ubuntu/.ssh /home/ubuntu/sky_workdir
chmod 700 /home/ubuntu/.ssh
echo "ubuntu ALL=(ALL) NOPASSWD:ALL" >/etc/sudoers.d/ubuntu
# The interpreter and the environment stand in folders that a host has of its own, or that are root's: put them back there.
mount -t tmpfs tmpfs /root && chmod 755 /root
mount -t tmpfs tmpfs /tmp && chmod 1777 /tmp
mkdir -p {base} {venv}
mount --bind /mnt/base {base}
mount --bind /mnt/venv {venv}
mount -t tmpfs tmpfs /run && mkdir -p /run/sshd /run/lock
mount -t tmpfs -o size=3g tmpfs /dev/shm && chmod 1777 /dev/shm
hostname ip-{dashed} && echo "127.0.0.1 ip-{dashed}" >>/etc/hosts
ssh-keygen -A >/dev/null
until ip -br addr show eth0 2>/dev/null | grep -q {private}; do sleep 0.1; done
exec /usr/sbin/sshd -D -e -o UsePAM=no -o "SetEnv=SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"
"""


def why_not() -> str | None:
    """Say why this cannot run here, if so."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [command for command in NEEDED if shutil.which(command) is None]
    if not Path("/usr/sbin/sshd").exists():
        missing.append("sshd")
    if missing:
        return f"{', '.join(missing)} missing: apt-get install openssh-server iproute2 iptables rsync sudo util-linux"
    if not Path("/home/ubuntu/skypilot-runtime/bin/ray").exists():
        return "the hosts' image is not here: tests/cloud/image.sh makes it"
    return None


@dataclass
class Host:
    """An instance that runs."""

    process: subprocess.Popen[bytes]
    link: str
    addresses: tuple[str, str]


class FakeEC2:
    """Follows moto: starts a host for every running instance, kills those of instances that ended."""

    def __init__(self, client: Any, folder: Path, venv: Path, base: Path) -> None:
        self._client = client
        self._folder = folder
        self._venv = venv
        self._base = base
        self._hosts: dict[str, Host] = {}

    @contextmanager
    def networked(self) -> Iterator[None]:
        """Lay out the network; on leaving kill every host and undo what was done to this machine's network."""
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "addr", "replace", f"{GATEWAY}/32", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        # moto hands out public addresses from here: none may leave this machine if a host does not have it.
        _run("ip", "route", "replace", "blackhole", "54.0.0.0/8")
        forward = Path("/proc/sys/net/ipv4/ip_forward")
        forwarded = forward.read_text()
        forward.write_text("1")
        rules = [
            [
                "iptables",
                "-t",
                "nat",
                "-A",
                "POSTROUTING",
                "-s",
                "172.31.0.0/16",
                "!",
                "-o",
                BRIDGE,
                "-j",
                "MASQUERADE",
            ],
            ["iptables", "-I", "FORWARD", "-i", BRIDGE, "-j", "ACCEPT"],
            ["iptables", "-I", "FORWARD", "-o", BRIDGE, "-j", "ACCEPT"],
        ]
        for rule in rules:
            _run(*rule)
        try:
            yield
        finally:
            for instance in list(self._hosts):
                self._kill(instance)
            for rule in rules:
                _run(*[{"-A": "-D", "-I": "-D"}.get(word, word) for word in rule])
            forward.write_text(forwarded)
            _run("ip", "route", "del", "blackhole", "54.0.0.0/8")
            _run("ip", "link", "del", BRIDGE)

    def follow(self, ended: threading.Event) -> None:
        """Do what moto says, until it is over."""
        while not ended.wait(1):
            reservations = self._client.describe_instances()["Reservations"]
            described = [instance for reservation in reservations for instance in reservation["Instances"]]
            running = {one["InstanceId"]: one for one in described if one["State"]["Name"] == "running"}
            for name in running.keys() - self._hosts.keys():
                self._start(name, running[name])
            for name in self._hosts.keys() - running.keys():
                self._kill(name)

    def _start(self, name: str, instance: dict[str, Any]) -> None:
        folder = self._folder / name
        folder.mkdir(parents=True)
        data = self._client.describe_instance_attribute(InstanceId=name, Attribute="userData")["UserData"]["Value"]
        keys = re.findall(r"ssh-\S+ \S+", base64.b64decode(data).decode())
        (folder / "keys").write_text("\n".join(keys) + "\n")
        private, public = instance["PrivateIpAddress"], instance["PublicIpAddress"]
        self._lay_out_venv(folder / "venv" / "up")
        init = INIT.format(
            folder=folder, base=self._base, venv=self._venv, private=private, dashed=private.replace(".", "-")
        )
        (folder / "init.sh").write_text(init)
        with (folder / "log").open("w") as log:
            command = [
                "setpriv",
                "--pdeathsig=KILL",
                "unshare",
                "--net",
                "--mount",
                "--pid",
                "--uts",
                "--ipc",
                "--fork",
            ]
            command += ["--kill-child=KILL", "--mount-proc", "bash", str(folder / "init.sh")]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (child := children.read_text().split()):
            time.sleep(0.05)
        link = f"v{name[-8:]}"
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", child[0])
        _run("ip", "link", "set", link, "master", BRIDGE, "up")
        for step in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{public}/32", "dev", "eth0"),
            ("addr", "add", f"{private}/32", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("route", "add", GATEWAY, "dev", "eth0"),
            ("route", "add", "default", "via", GATEWAY, "src", private),
        ):
            _run("nsenter", "-t", child[0], "-n", "ip", *step)
        for address in (private, public):
            _run("ip", "route", "replace", f"{address}/32", "dev", BRIDGE)
        self._hosts[name] = Host(process, link, (private, public))

    def _lay_out_venv(self, over: Path) -> None:
        """Make the host's copy of the environment run the code that was synced to it, and say that it is up to date."""
        site = next(self._venv.glob("lib/python3*/site-packages"))
        for file in site.glob("__editable__*roentgen*"):
            target = over / file.relative_to(self._venv)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(file.read_text().replace(str(ROOT), "/home/ubuntu/sky_workdir"))
        over.mkdir(parents=True, exist_ok=True)
        files = b"".join((ROOT / file).read_bytes() for file in ("pyproject.toml", "constraints.txt"))
        digest = subprocess.run(["sha256sum"], input=files, capture_output=True, check=True).stdout.split()[0].decode()
        (over / ".synced").write_text(f"{digest}-full\n")

    def _kill(self, name: str) -> None:
        host = self._hosts.pop(name)
        host.process.kill()
        host.process.wait()
        _run("ip", "link", "del", host.link)
        for address in host.addresses:
            _run("ip", "route", "del", f"{address}/32")


def _run(*command: str) -> None:
    """Run a command that may find its work done already, as after a test that was killed."""
    subprocess.run(command, check=False, capture_output=True)


def open_the_default_network(client: Any) -> None:
    """Give moto's default network the way to the Internet that AWS's has: SkyPilot looks for it."""
    vpc = client.describe_vpcs()["Vpcs"][0]["VpcId"]
    gateway = client.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
    client.attach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
    for table in client.describe_route_tables()["RouteTables"]:
        client.create_route(RouteTableId=table["RouteTableId"], DestinationCidrBlock="0.0.0.0/0", GatewayId=gateway)


def make_the_role(client: Any) -> None:
    """Make the role that SkyPilot gives to nodes: what it would write into it by itself moto refuses."""
    trusted = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [trusted]})
    client.create_instance_profile(InstanceProfileName=ROLE)
    client.create_role(RoleName=ROLE, AssumeRolePolicyDocument=policy)
    client.add_role_to_instance_profile(InstanceProfileName=ROLE, RoleName=ROLE)


def main(endpoint: str, folder: str, venv: str, base: str) -> None:
    """Follow a moto server until SIGTERM."""
    import boto3

    session = boto3.Session("testing", "testing", region_name="us-east-1")
    client = session.client("ec2", endpoint_url=endpoint)
    open_the_default_network(client)
    make_the_role(session.client("iam", endpoint_url=endpoint))
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ec2 = FakeEC2(client, Path(folder), Path(venv), Path(base))
    with ec2.networked():
        print("ready", flush=True)
        ec2.follow(ended)


if __name__ == "__main__":
    main(*sys.argv[1:])
