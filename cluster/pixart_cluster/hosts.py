"""A recipe's nodes without Kubernetes: ``ray up`` on AWS, and a SLURM script.

Both start Ray with a token that is made where they are started, and keep its dashboard on the
head's own loopback: reach it through SSH. AWS: nodes have no public address (start from inside the
network), and the profiles ``pixart-head`` and ``pixart-node`` hold their rights. EFA, drivers and
the folder ``/shared`` are the AMI's: name yours as ``ImageId``.
"""

import shlex

from pixart_cluster.groups import ROLE, SHARED, Group, find_groups, fits_small_gpus
from pixart_cluster.pods import Document
from pixart_cluster.recipe import FullRecipe

_TOKEN = "~/.ray/auth_token"  # ray get-auth-token --generate
_ENVIRONMENT_FILE = "/etc/pixart/environment"  # of the AMI: MLFLOW_TRACKING_URI and who asks
_IDLE_MINUTES = 10
_SSD_GB = 500
_PORT = 6379
# By GPUs of a captioner or encoder, each an A10G. What nodes cost: ``pixart plan``.
_ENCODING = {0: "c7i.2xlarge", 1: "g5.2xlarge", 2: "g5.12xlarge", 4: "g5.12xlarge"}


def aws_cluster(recipe: FullRecipe, image: str) -> Document:
    """For ``ray up``: a small head, and groups that start at nothing and grow as jobs ask."""
    groups = find_groups(recipe)
    head: Document = {
        "resources": {"CPU": 0}, "node_config": _node_config("m7i.2xlarge", "pixart-head"),
    }  # fmt: skip
    return {
        "cluster_name": recipe.name,
        "max_workers": sum(group.num_nodes for group in groups),
        "idle_timeout_minutes": _IDLE_MINUTES,
        "provider": {
            "type": "aws", "region": "us-east-1", "use_internal_ips": True,
            "cache_stopped_nodes": False,
        },
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": image, "container_name": "pixart", "pull_before_run": True,
            "run_options": [f"--volume {SHARED}:{SHARED}", "--ulimit nofile=65536:65536",
                            "--env RAY_AUTH_MODE=token", f"--env-file {_ENVIRONMENT_FILE}"],
        },
        "file_mounts": {_TOKEN: _TOKEN},
        "available_node_types": {"head": head, **{g.role: _node_type(recipe, g) for g in groups}},
        "head_node_type": "head",
        "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
        "head_start_ray_commands": [
            "ray stop",
            f"ray start --head --port={_PORT} --dashboard-host=127.0.0.1 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"ray start --address=$RAY_HEAD_IP:{_PORT}"],
    }  # fmt: skip


def _node_type(recipe: FullRecipe, group: Group) -> Document:
    node = _node_config(_instance_type(recipe, group), "pixart-node")
    if group.is_spot:
        node["InstanceMarketOptions"] = {"MarketType": "spot"}
    resources = {"CPU": group.cpus} | ({"GPU": group.gpus} if group.gpus else {})
    return {
        "min_workers": 0, "max_workers": group.num_nodes, "resources": resources,
        "labels": {ROLE: group.role}, "node_config": node,
    }  # fmt: skip


def _instance_type(recipe: FullRecipe, group: Group) -> str:
    if group.role == "encoding":
        return _ENCODING.get(group.gpus, "g5.48xlarge")
    if not group.gpus:
        return "c7i.4xlarge"
    return "p4d.24xlarge" if fits_small_gpus(recipe) else "p4de.24xlarge"


def _node_config(instance_type: str, profile: str) -> Document:
    disk = {"VolumeSize": _SSD_GB, "VolumeType": "gp3", "Encrypted": True}
    return {
        "InstanceType": instance_type,
        "IamInstanceProfile": {"Name": profile},
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
    }


def slurm_script(recipe: FullRecipe) -> str:
    """An sbatch script of one part a group; the batch host, which reads, is Ray's head too.

    Started again it continues. Where Python's environment lies, ``PIXART_BIN`` says.
    """
    training, encoding, reading = find_groups(recipe)
    parts = [reading, encoding, training]
    head, starts = "\n#SBATCH hetjob\n".join(map(_resources, parts)), []
    for index, group in enumerate(parts):
        nodes = group.num_nodes - (index == 0)
        if nodes:
            where = f"--het-group={index} --nodes={nodes} --ntasks={nodes}"
            without = ' --exclude="$HEAD"' if index == 0 else ""
            starts.append(f'srun {where}{without} {_start(group)} --address="$HEAD:{_PORT}" &')
    return _SCRIPT.format(
        name=recipe.name, root=f"{SHARED}/{recipe.name}", port=_PORT, parts=head,
        head=_start(reading), starts="\n".join(starts), role=ROLE,
    )  # fmt: skip


def _resources(group: Group) -> str:
    asked = [
        f"--nodes={group.num_nodes}", "--ntasks-per-node=1", f"--cpus-per-task={group.cpus}",
        f"--mem={group.memory_gib}G", *([f"--gpus-per-node={group.gpus}"] if group.gpus else []),
    ]  # fmt: skip
    return f"# {group.role}\n#SBATCH {' '.join(asked)}"


def _start(group: Group) -> str:
    label = shlex.quote(f"{ROLE}={group.role}")
    gpus = f" --num-gpus={group.gpus}" if group.gpus else ""
    return f"ray start --block --num-cpus={group.cpus}{gpus} --labels={label}"


_SCRIPT = """\
#!/usr/bin/env bash
# Made by: pixart render, from the recipe {name}. Change that instead.
# Submit it from its folder: sbatch --export=ALL,PIXART_BIN=/path/to/.venv/bin slurm.sh
#SBATCH --job-name={name}
#SBATCH --requeue
#SBATCH --open-mode=append
{parts}
set -euo pipefail
export PATH="${{PIXART_BIN:?where pixart and ray are installed}}:$PATH"
: "${{MLFLOW_TRACKING_URI:?where the registry is}}"

# Nobody without this token can use the cluster; it lives as long as the job, in its environment.
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
HEAD=$(hostname -s)
export RAY_AUTH_MODE RAY_AUTH_TOKEN HEAD
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT

{head} --head --port={port} --dashboard-host=127.0.0.1 &
until ray health-check --address="$HEAD:{port}" >/dev/null 2>&1; do sleep 2; done
{starts}

RAY_ADDRESS="$HEAD:{port}" pixart run "$SLURM_SUBMIT_DIR/recipe.yaml" --root {root}
"""
