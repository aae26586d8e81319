#!/usr/bin/env bash
# Makes what the hosts of fake_ec2.py take from this machine as their image: a user `ubuntu` with SkyPilot's runtime in its home
# folder, as SkyPilot would otherwise install it on every host, from the web. As root; once.
#   image.sh PYTHON     an interpreter with SkyPilot installed (make cloud-env)
set -euo pipefail
python=$1
home=/home/ubuntu
missing=$(for one in ip iptables rsync sudo sshd; do PATH=$PATH:/usr/sbin command -v $one >/dev/null || echo $one; done)
[ -z "$missing" ] || apt-get install --yes --quiet --no-install-recommends openssh-server iproute2 iptables rsync sudo
id ubuntu >/dev/null 2>&1 || useradd --create-home --shell /bin/bash ubuntu
usermod --password '*' ubuntu  # not locked: sshd refuses locked users, also with a key
[ ! -e $home/.image ] || exit 0
mkdir -p $home/.local/bin
"$python" -m pip install --quiet --target $home/.uv uv
cp $home/.uv/bin/uv $home/.local/bin/uv
"$("$python" -c 'import sys; print(sys.base_prefix)')/bin/python3" -m venv $home/skypilot-runtime
version=$("$python" -c 'import sky; print(sky.__version__)')
ray=$("$python" -c 'from sky.skylet import constants; print(constants.SKY_REMOTE_RAY_VERSION)')
$home/skypilot-runtime/bin/python -m pip install --quiet "setuptools<70" "click<8.3.0" "ray[default]==$ray" \
  "pydantic-core==2.41.1" "skypilot[aws,remote]==$version"
touch $home/.image
chown -R ubuntu:ubuntu $home
