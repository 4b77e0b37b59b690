"""Two hosts, as far as one machine can be two: network namespaces with a cable between them that can be pulled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import RECIPES, ROOT, Runs, assert_same_run, events, sequence

STRATEGY = "adapt_planned"
# Dropout differs with the number of processes.
SETTINGS: dict[str, Any] = {"model.attn_dropout": 0, "budget.tokens": 900}


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """The namespaces' names; in each is an end of the cable, `eth`, with the address 10.77.0.1 or 10.77.0.2."""
    names = (f"host1-{os.getpid()}", f"host2-{os.getpid()}")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth", "netns", names[0], "type", "veth", "peer", "name", "eth", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth")
            for link in ("lo", "eth"):
                ip("-n", name, "link", "set", link, "up")
    except OSError as error:
        _remove(names)
        pytest.skip(f"cannot make network namespaces: {error}")
    yield names
    _remove(names)


def _remove(names: tuple[str, str]) -> None:
    for name in names:
        inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
        for pid in inside:  # of a test that failed
            os.kill(int(pid), 9)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


class Launched:
    """`tune run` on both hosts, and what each says."""

    def __init__(self, hosts: tuple[str, str], arguments: list[str], environment: dict[str, str], said: Path) -> None:
        self._said = [said / f"host {number}.txt" for number in range(2)]
        self._processes = []
        for number, (host, file) in enumerate(zip(hosts, self._said, strict=True)):
            where = ("--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(number), "--rdzv_backend", "static")
            command = ["ip", "netns", "exec", host, sys.executable, "-m", "tune_cli_ext", "run", *where]
            command += ["--rdzv_endpoint", "10.77.0.1:29400", *arguments]
            with open(file, "w") as output:
                self._processes.append(
                    subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output)
                )

    def running(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def end(self) -> list[int]:
        """Their exit statuses."""
        return [process.wait(120) for process in self._processes]

    def said(self, number: int) -> list[str]:
        """Lines of host 0 or 1."""
        return self._said[number].read_text().splitlines()


@pytest.mark.root
def test_two_hosts_and_a_cable_that_is_pulled(hosts: tuple[str, str], tmp_path: Path) -> None:
    """It ends on both, and its resume ends as one process, or two on one host, that nothing happened to."""
    runs, folder = Runs(tmp_path), tmp_path / "run"
    # A process of this environment waits 5 seconds, not a minute, for a host that does not answer.
    impatient = "import adapt_recipes.training.sockets\n\nadapt_recipes.training.sockets.DEAD_PEER_SECONDS = 5\n"
    (tmp_path / "impatient").mkdir()
    (tmp_path / "impatient" / "sitecustomize.py").write_text(impatient)
    environment = {
        "PYTHONPATH": f"{tmp_path / 'impatient'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth",  # or gloo takes the address that the host's own name has: here 127.0.0.1
    }
    arguments = [RECIPES[STRATEGY], *runs.argv(STRATEGY, folder, **SETTINGS)]

    launched = Launched(hosts, arguments, environment, tmp_path)
    while launched.running() and not any(event["step"] >= 5 for event in events(folder)):
        time.sleep(0.01)
    ip("-n", hosts[0], "link", "set", "eth", "down")
    assert launched.end() == [2, 2], launched.said(0) + launched.said(1)
    for number in range(2):
        (line,) = (line for line in launched.said(number) if line.startswith(("error: ", "Traceback")))
        gone = r"another process has ended or does not answer, without an error message \(.+\)"
        assert re.fullmatch(f"error: ({gone}|stopped by SIGTERM, but not all processes answer; .*)", line)
    assert not (folder / "summary.json").exists()

    ip("-n", hosts[0], "link", "set", "eth", "up")
    launched = Launched(hosts, arguments, environment, tmp_path)
    assert launched.end() == [0, 0], launched.said(0) + launched.said(1)
    assert any(event["event"] == "resume" for event in events(folder))
    assert runs.finish_group(STRATEGY, tmp_path / "one host", **SETTINGS) == [0, 0]
    assert_same_run(folder, tmp_path / "one host")
    assert runs.run(STRATEGY, tmp_path / "one process", **SETTINGS) == 0
    here, there = sequence(folder), sequence(tmp_path / "one process")
    assert len(here) == len(there) >= 30
    for ours, theirs in zip(here, there, strict=True):
        assert ours.keys() == theirs.keys()
        assert [ours[key] for key in COUNTS & ours.keys()] == [theirs[key] for key in COUNTS & ours.keys()]
        for key in ("loss", "losses", "task_losses", "probabilities"):
            assert ours.get(key) == pytest.approx(theirs.get(key), abs=1e-5), (ours["event"], ours["step"])


COUNTS = {"event", "step", "supervised_tokens", "tokens", "task_tokens"}
