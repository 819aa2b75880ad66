"""`python -m hpo.launch.ray_driver ADDRESS`: Ray's client as a process of its own, one JSON line in, one JSON line out.

Ray ends the process that is connected to it when it loses its head. Here that ends no `hpo run`. This module and
`ray_worker` alone import Ray.
"""

import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.experimental import internal_kv
from ray.util import list_named_actors

from hpo.launch import ray_worker
from hpo.launch.ray_worker import NAMESPACE, Worker

DELIVERY = 10.0  # seconds that actors have to take the message that their workers are to leave
AUTOSCALER = b"__autoscaling_status"  # the key where it reports
Answer = Any  # what JSON takes


def main() -> None:
    """Answer until the other side closes the pipe."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what Ray prints is no answer
    try:
        ray.init(address=sys.argv[1], namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        ray.cloudpickle.register_pickle_by_value(ray_worker)
        error = ""
    except Exception as failure:
        error = _first_line(failure)
    print(json.dumps({"error": error}), file=answers, flush=True)
    for line in sys.stdin if not error else ():
        question = json.loads(line)
        try:
            answer = {"answer": ACTIONS[question["action"]](**question["arguments"]), "error": ""}
        except Exception as failure:
            answer = {"error": _first_line(failure)}
        print(json.dumps(answer), file=answers, flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def hand_in(
    fleet: str,
    commands: Sequence[Sequence[str]],
    options: Mapping[str, Any],
    variables: Mapping[str, str],
    needs_credentials: bool,
) -> None:
    """Create an actor for each command; it waits until it fits somewhere."""
    actor = ray.remote(Worker)
    for words in commands:
        name = f"{fleet}/{secrets.token_hex(3)}"
        actor.options(name=name, lifetime="detached", max_restarts=-1, max_concurrency=3, **options).remote(
            name, words, variables, needs_credentials
        )


def placed(fleet: str, needed: Mapping[str, float]) -> list[dict[str, Any]]:
    """What became of the workers of a fleet."""
    names, nodes = set(_names(fleet)), [node for node in ray.nodes() if node["Alive"]]
    alive, records = {node["NodeID"] for node in nodes}, _records(fleet)
    fits = any(all(node["Resources"].get(key, 0) >= amount for key, amount in needed.items()) for node in nodes)
    what = ", ".join(f"{amount:g} {key}" for key, amount in needed.items())
    can_grow = _has_autoscaler()
    busy = f"no node has {what} free" if fits else f"no node has {what}{' yet' if can_grow else ''}"
    workers = []
    for name in sorted(names | records.keys()):
        record = records.get(name, {})
        state = record.get("state", "waiting")
        if name not in names:
            state = "ended"
        elif state not in ("running", "leaving") or record.get("node") not in alive:
            state = "waiting"
        reason = busy if state == "waiting" else record.get("reason", "")
        workers.append(
            {
                "id": name,
                "fate": state,
                "host": record.get("host", "") if state == "running" else "",
                "reason": reason,
                "is_hopeless": state == "waiting" and not fits and not can_grow,
            }
        )
    return workers


def take_back(fleet: str, waiting_only: bool) -> None:
    """Remove actors that run nowhere; let the workers of the others leave."""
    told = list[Any]()
    for worker in placed(fleet, {}):
        try:
            if worker["fate"] == "waiting":
                ray.kill(ray.get_actor(worker["id"]), no_restart=True)
            elif worker["fate"] == "running" and not waiting_only:
                told.append(ray.get_actor(worker["id"]).leave.remote())
        except ValueError:
            pass  # it has ended meanwhile
    if told:  # this process may end at once, and what it has not sent by then is lost
        ray.wait(told, num_returns=len(told), timeout=DELIVERY)


def output(fleet: str) -> str:
    """The end of what the workers of a fleet wrote."""
    return "\n".join(record.get("output", "") for record in _records(fleet).values())


def forget(fleet: str) -> None:
    """Remove the records of a fleet."""
    for name in _records(fleet):
        internal_kv._internal_kv_del(f"hpo:{name}", namespace=NAMESPACE)


def hosts() -> list[str]:
    """The host names of the nodes."""
    return sorted({node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]})


def _names(fleet: str) -> list[str]:
    actors = list_named_actors(all_namespaces=True)
    return [
        actor["name"] for actor in actors if actor["namespace"] == NAMESPACE and actor["name"].startswith(f"{fleet}/")
    ]


def _records(fleet: str) -> dict[str, dict[str, Any]]:
    """What the actors wrote down, by their names."""
    keys = internal_kv._internal_kv_list(f"hpo:{fleet}/", namespace=NAMESPACE)
    values = {key.decode(): internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys}
    return {key.removeprefix("hpo:"): json.loads(value) for key, value in values.items() if value is not None}


def _has_autoscaler() -> bool:
    """Whether nodes are added for what waits. Without that, Ray reports each node as a type of its own."""
    config = ray._private.state.state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return True
    try:
        report = json.loads(internal_kv._internal_kv_get(AUTOSCALER) or b"{}")
    except ValueError:
        return False
    types = (report.get("autoscaler_report") or {}).get("active_nodes") or {}
    return any(not re.fullmatch("node_[0-9a-f]+", name) for name in types)


ACTIONS: Mapping[str, Callable[..., Answer]] = {
    function.__name__: function for function in (hand_in, placed, take_back, output, forget, hosts)
}

if __name__ == "__main__":
    main()
