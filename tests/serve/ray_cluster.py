"""Two Ray nodes on loopback that serve what a file for `serve run` says. It runs where Ray is installed: .ray-venv.

ray_cluster.py CONFIG    answers each line of standard input, status, remove or add, by a line of JSON
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

NODE = {"node_ip_address": "127.0.0.1", "object_store_memory": 100_000_000}


class TwoNodes:
    """A head with room for the door and one replica, and a node with room for another."""

    def __init__(self) -> None:
        head = {"num_cpus": 2, "resources": {"head": 1}, "include_dashboard": False, **NODE}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.add()
        ray.init(address=self.cluster.address, log_to_driver=False, _node_ip_address="127.0.0.1")

    def serve(self, config: str) -> None:
        """Deploys as a user does."""
        command = [Path(sys.executable).with_name("serve"), "run", "--non-blocking", "--address", self.cluster.address]
        subprocess.run([*command, config], check=True, stdout=sys.stderr)

    def add(self) -> None:
        self.second = self.cluster.add_node(num_cpus=1, **NODE)

    def remove(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)

    def status(self) -> dict[str, Any]:
        """Returns how many replicas are running, as Ray Serve says, and the process ids of each node's."""
        application = next(iter(serve.status().applications.values()), None)
        engine = application.deployments.get("Engine") if application else None
        nodes = {"head": self.cluster.head_node, "second": self.second}
        running = engine.replica_states.get("RUNNING", 0) if engine else 0
        return {"running": running, "pids": {name: _engines(node) for name, node in nodes.items()}}


def _engines(node: Any) -> list[int]:
    """Ids of a node's workers that are replicas of Engine."""
    found = list[int]()
    for raylet in node.all_processes.get("raylet", []):
        children = Path(f"/proc/{raylet.process.pid}/task/{raylet.process.pid}/children")
        for pid in children.read_text().split() if children.exists() else ():
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            found += [int(pid)] if line.startswith(b"ray::ServeReplica:") and b":Engine" in line else []
    return found


def main(config: str) -> None:
    nodes, answers = TwoNodes(), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints, too
    try:
        nodes.serve(config)
        for line in sys.stdin:
            answer = getattr(nodes, line.strip())()
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()
        nodes.cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
